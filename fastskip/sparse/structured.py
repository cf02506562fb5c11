"""2:4 sparsity as NVIDIA's tensor cores read it, through torch; CUDA only.

Of every four consecutive weights at most two are kept, so half of them are stored, with two bits of
metadata each. GEMMs of many rows (prefill) run faster; a decode step only reads fewer bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastskip.sparse.matrices import SparseError, matrices
from fastskip.wording import dtype_name

_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 64
"""A weight's rows and columns must be multiples of this, so that both cuSPARSELt and CUTLASS take
it in bf16 and fp16."""
_ARCH = (8, 0)


def semi_structured_(model: Any) -> tuple[str, ...]:
    """Converts every 2:4 projection to torch's semi-structured form, in place; returns their names.

    A prepared model then calls its modules one by one. These weights cannot be trained or saved:
    save the pruned model first.

    Raises:
        SparseError: the form does not support the device, dtype or a shape, or no weight is 2:4.
    """
    found = [matrix for matrix in matrices(model) if is_two_of_four(matrix.weight)]
    if not found:
        allowed = "a model pruned to 2:4 (fastskip prune --pattern 2:4)"
        raise SparseError("model", "no projection is 2:4", allowed)
    for matrix in found:  # check all before changing any
        check_semi_structured(matrix.name, matrix.weight)
    for matrix in found:
        held: Any = torch.sparse.to_sparse_semi_structured(matrix.weight.detach())
        matrix.linear.weight = nn.Parameter(held, requires_grad=False)
    return tuple(matrix.name for matrix in found)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive entries of each row of ``weight [M, E]`` are
    nonzero; false if ``E`` is not a multiple of four."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.view(-1, 4) != 0).sum(1) <= 2).all())


def check_semi_structured(name: str, weight: Tensor) -> None:
    """Raises ``SparseError``, which names the weight, if torch cannot store it in this form."""
    device = weight.device
    if device.type != "cuda":
        raise SparseError(name, f"on {device}", "a CUDA device, sm_80 or newer")
    if torch.cuda.get_device_capability(device) < _ARCH:
        raise SparseError(name, torch.cuda.get_device_name(device), "sm_80 or newer")
    if weight.dtype not in _DTYPES:
        allowed = ", ".join(dtype_name(dtype) for dtype in _DTYPES)
        raise SparseError(name, dtype_name(weight.dtype), allowed)
    if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
        raise SparseError(name, f"shape {list(weight.shape)}", f"both multiples of {_MULTIPLE}")
