"""The findings of "Skipping Computations in Multimodal LLMs" (arXiv 2410.09454), in miniature.

The paper's experiments on the demo's models and scenes: what is measured (`experiments`), how
(`measuring`, `tuning`, `runner`), what came out (`results`), and what that says (`findings`,
`report`, `figures`). Another model and another task than the paper's: what agrees is encouraging,
what does not is no refutation.
"""
