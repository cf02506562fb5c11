"""Kernels have no backward pass, and say so instead of silently dropping gradients."""

from __future__ import annotations

from torch import Tensor


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Raises if any tensor requires a gradient.

    Raises:
        ValueError: naming the first tensor that requires a gradient.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but the kernels have no backward pass; "
                "run under torch.no_grad() or with impl='torch'"
            )
