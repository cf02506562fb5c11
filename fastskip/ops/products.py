"""``x @ weight.T + bias`` on a CPU in fp32: the same sums, asked of the library in another form.

The library packs a weight matrix once a call, and of a large one that costs more than the product
of a few rows. Two forms avoid it, and which one does depends on the number of rows alone:

- few rows: the weight is the first factor, ``(weight @ x.T).T``, and is not packed;
- more rows: slices of the weight, each of which stays in the cache once it is packed.

``benchmarks/products.py`` measures both against the plain call; the bounds below are from there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.allocate import empty

LARGE = 1 << 20
"""Weights from which on packing them shows; smaller ones stay in the cache."""
FEW = 64
"""Rows that are no reason to pack a weight, where several threads share the work."""
FEWER = 4
"""The same for one thread."""
MANY = 2048
"""Rows from which on packing a weight no longer shows."""
SLICE = 1024
"""Out features of a slice."""
_WIDTH = 16
"""Columns of a result that are computed together, if there are more than half as many."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, E] x [M, E] -> [N, M]``, contiguous; ``bias [M]``."""
    rows = len(x)
    if rows <= 1 or weight.numel() < LARGE or not _is_ours(x, weight):
        return F.linear(x, weight, bias)
    if rows <= (FEW if torch.get_num_threads() > 1 else FEWER):
        return _weight_first(_filled(x), weight, bias)[:rows]
    if rows < MANY and len(weight) > SLICE:
        return _sliced(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether the other forms are quicker, and nobody asks for gradients, which they have not."""
    is_plain = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_plain and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _filled(x: Tensor) -> Tensor:
    """``x`` and rows of zeros up to a full width."""
    missing = -len(x) % _WIDTH if len(x) > _WIDTH // 2 else 0
    return torch.cat((x, x.new_zeros(missing, x.shape[1]))) if missing else x


def _weight_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = empty((len(x), len(weight)), x.dtype, x.device)
    product = torch.mm(weight, x.t()).t()
    return out.copy_(product) if bias is None else torch.add(product, bias, out=out)


def _sliced(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = empty((len(x), len(weight)), x.dtype, x.device)
    for first in range(0, len(weight), SLICE):
        own = slice(first, first + SLICE)
        if bias is None:
            torch.mm(x, weight[own].t(), out=out[:, own])
        else:
            torch.addmm(bias[own], x, weight[own].t(), out=out[:, own])
    return out
