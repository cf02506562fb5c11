"""2:4 sparsity as NVIDIA's tensor cores read it, through torch: on CUDA only.

Of four weights in a row at most two are kept, so half of them and two bits each are held. Such
products are faster for many rows (prompts); a step of decoding only reads fewer bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastskip.sparse.matrices import SparseError, matrices

_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 64
"""Rows and columns of a weight that cuSPARSELt and CUTLASS both take in bf16 and fp16."""
_ARCH = (8, 0)


def semi_structured_(model: Any) -> tuple[str, ...]:
    """Holds every 2:4 projection in torch's semi-structured form, in place; returns their names.

    A prepared model calls its modules one by one from then on. These weights cannot be trained or
    saved: write the pruned model first.

    Raises:
        SparseError: the device, dtype or a shape does not have the form, or no weight is 2:4.
    """
    found = [matrix for matrix in matrices(model) if is_two_of_four(matrix.weight)]
    if not found:
        allowed = "a model pruned to 2:4 (fastskip prune --pattern 2:4)"
        raise SparseError("model", "no projection is 2:4", allowed)
    for matrix in found:  # all of them, before any is changed
        check_semi_structured(matrix.name, matrix.weight)
    for matrix in found:
        held: Any = torch.sparse.to_sparse_semi_structured(matrix.weight.detach())
        matrix.linear.weight = nn.Parameter(held, requires_grad=False)
    return tuple(matrix.name for matrix in found)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four neighbours in a row are not 0.

    ``[M, E]``, with ``E`` a multiple of four; else it is none.
    """
    if weight.shape[1] % 4:
        return False
    return bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all())


def check_semi_structured(name: str, weight: Tensor) -> None:
    """Raises ``SparseError`` for a weight that torch cannot hold in this form; names it."""
    device = weight.device
    if device.type != "cuda":
        raise SparseError(name, f"on {device}", "a CUDA device, sm_80 or newer")
    if torch.cuda.get_device_capability(device) < _ARCH:
        raise SparseError(name, torch.cuda.get_device_name(device), "sm_80 or newer")
    if weight.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise SparseError(name, str(weight.dtype).removeprefix("torch."), allowed)
    if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
        raise SparseError(name, f"shape {list(weight.shape)}", f"multiples of {_MULTIPLE}")
