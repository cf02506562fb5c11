"""What projections take in memory where they are not held as plain weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastskip.plan import ModelShape
from fastskip.sparse.matrices import matrices


def bytes_of_weight(model: Any, shape: ModelShape) -> float | None:
    """Bytes in memory of one weight of the decoder's projections, their mean, scales and zeros'
    places included; ``None`` where all of them are plain, so that their dtype says it.

    Args:
        model: a Hugging Face model, quantised or sparse or neither.
        shape: its sizes.
    """
    found = list(matrices(model))
    if all(matrix.is_plain for matrix in found):
        return None
    return sum(_bytes_of(matrix.linear) for matrix in found) / (shape.depth * shape.layer_weights)


def _bytes_of(module: nn.Module) -> int:
    # No state dict: a bitsandbytes module on a CPU packs its weight anew to make one.
    return sum(_stored(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _stored(tensor: Any) -> int:
    """Bytes of a tensor with its scales, or of those that a wrapper of tensors holds."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        return sum(_stored(getattr(tensor, name)) for name in names)
    # Where bitsandbytes keeps them: of int8; of 4 bits, which may have scales of their own.
    state = getattr(tensor, "quant_state", None)
    inner = getattr(state, "state2", None)
    scales = (
        getattr(tensor, "SCB", None),
        *(getattr(each, "absmax", None) for each in (state, inner)),
    )
    sizes: list[int] = [each.nbytes for each in (tensor, *scales) if each is not None]
    return sum(sizes)
