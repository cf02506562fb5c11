"""The findings of "Skipping Computations in Multimodal LLMs" (arXiv 2410.09454), in miniature.

The paper's experiments on the demo's models and scenes: what is measured (`experiments`), how
(`measuring`, `tuning`, `runner`), the results (`results`), and what they say (`findings`, `report`,
`figures`). Model and task differ from the paper's: agreement is encouraging, disagreement is no
refutation.
"""
