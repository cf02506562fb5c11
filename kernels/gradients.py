"""Kernels compute no gradients, and say so instead of dropping them."""

from __future__ import annotations

from torch import Tensor


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Raises unless every tensor is free of gradients.

    Raises:
        ValueError: naming the first tensor that requires a gradient.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, and kernels compute none; "
                "run under torch.no_grad() or with impl='torch'"
            )
