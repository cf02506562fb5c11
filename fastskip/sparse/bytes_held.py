"""The memory of projections that are not held as plain weights."""

from __future__ import annotations

from typing import Any

from fastskip.plan import ModelShape
from fastskip.sparse.matrices import matrices


def bytes_of_weight(model: Any, shape: ModelShape) -> float | None:
    """Mean bytes in memory per weight of the decoder's projections, including scales and sparsity
    metadata; ``None`` if all are plain, so that the dtype determines it.

    Args:
        model: a Hugging Face model: quantised, sparse or plain.
        shape: the sizes of the model.
    """
    found = list(matrices(model))
    if all(matrix.is_plain for matrix in found):
        return None
    # Not from state dicts: for one, a bitsandbytes module on a CPU repacks its weight.
    tensors = (t for own in found for t in (*own.linear.parameters(), *own.linear.buffers()))
    return sum(map(_bytes_of, tensors)) / (shape.depth * shape.layer_weights)


def _bytes_of(tensor: Any) -> int:
    """Bytes of a tensor and its scales, or of the tensors that a wrapper subclass holds."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        return sum(_bytes_of(getattr(tensor, name)) for name in names)
    # bitsandbytes keeps scales in SCB (int8) or quant_state (4 bits, perhaps quantised themselves).
    state = getattr(tensor, "quant_state", None)
    inner = getattr(state, "state2", None)
    scales = (
        getattr(tensor, "SCB", None),
        *(getattr(each, "absmax", None) for each in (state, inner)),
    )
    sizes: list[int] = [each.nbytes for each in (tensor, *scales) if each is not None]
    return sum(sizes)
