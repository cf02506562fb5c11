"""A CUDA device that is only pretended, for what goes wrong on one and needs none to be seen.

Tensors say that they lie on ``cuda:0`` and hold memory of the host; kernels run in Triton's
interpreter. What mixes devices raises, as it would there. Where the host would wait, what a capture
forbids, and what a graph reads after it has been freed is written down (``log.py``). It patches
torch, so it wants a process of its own (``__main__.py``).
"""
