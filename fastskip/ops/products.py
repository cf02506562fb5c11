"""``x @ weight.T + bias`` on a CPU: the same sums, requested from the library differently. Here in
fp32; ``half_products`` is the same for half precision.

The plain call is the fastest on Intel's CPUs. On AMD's, MKL, given all of a large weight, first
copies it into another layout, which for some row counts costs more than the GEMM itself, and the
weight is then no longer in the cache. So there the weight is passed slice by slice; and while rows
are few, it is the first factor, ``(weight @ x.T).T``, which several threads share better. A single
row, which the plain call computes on one thread at half of its bandwidth, becomes a batch of small
products with parts of the weight: these use all threads and read the weight in place.
``benchmarks/products.py`` measures this against the plain call; the bounds below come from there.
Between the two products of an FFN, rows stay in the columns that the first one produces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops import half_products, processor
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, Linear
from fastskip.ops.reference import activate

LARGE, LARGE_FOR_ONE = 1 << 20, 1 << 15
"""Weight elements from which the layout matters; smaller weights stay in the cache. For a single
row: from which the product outweighs the call overhead."""
FEWEST, FEW = 16, 256
"""The weight is the first factor up to ``FEW`` rows; in an FFN, only above ``FEWEST``."""
NOT_WITH_AVX512 = range(7, 9)
"""Row counts left to the plain call there; a single thread leaves all above two to it."""
MANY = 2048
"""Rows from which the GEMM itself dominates everything else."""
SLICE = 1024
"""Out features per slice."""
PARTS = 64
"""Most parts into which a weight is split for a single row: threads share them."""
_WIDTH = 16
"""Rows are padded to a multiple of this, if there are more than half as many."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, E] x [M, E] -> [N, M]``, contiguous; ``bias [M]``."""
    if x.dtype is not torch.float32:
        return half_products.linear(x, weight, bias)
    rows = len(x)
    if rows == 1 and _applies(x, weight, LARGE_FOR_ONE):
        return _multiply_row(x, weight, bias)
    if not (1 < rows < MANY and _applies(x, weight, LARGE) and _is_faster(rows)):
        return F.linear(x, weight, bias)
    if len(weight) <= SLICE and (rows > FEW or torch.get_num_threads() == 1):
        return F.linear(x, weight, bias)
    if rows <= FEW:
        return _sliced(_multiply_weight, _padded(x), weight, bias, rows)
    return _sliced(_multiply_rows, x, weight, bias, rows)


def feed_forward(x: Tensor, up: Linear, activation: Activation, down: Linear) -> Tensor:
    """``down(activation(up(x)))``: ``[N, D] -> [N, D]``, contiguous."""
    if x.dtype is not torch.float32:
        return half_products.feed_forward(x, up, activation, down)
    rows = len(x)
    if not (
        FEWEST < rows <= FEW
        and _is_faster(rows)
        and _applies(x, up.weight, LARGE)
        and _applies(x, down.weight, LARGE)
    ):
        return linear(activate(linear(x, up.weight, up.bias), activation), down.weight, down.bias)
    columns = _padded(x).t()
    fed = empty((len(up.weight), columns.shape[1]), x.dtype, x.device)
    for own in _slices(up.weight):
        torch.mm(up.weight[own], columns, out=fed[own])
    if up.bias is not None:
        fed += up.bias[:, None]
    inner = activate(fed.t(), activation)  # keeps the memory layout
    return _sliced(_multiply_weight, inner, down.weight, down.bias, rows)


def _is_faster(rows: int) -> bool:
    """Whether the other forms are faster for several rows: not always with AVX-512, where the plain
    call copies less."""
    if not processor.has_avx512():
        return True
    return rows <= 2 if torch.get_num_threads() == 1 else rows not in NOT_WITH_AVX512


def _applies(x: Tensor, weight: Tensor, fewest: int) -> bool:
    """Whether the other forms apply: a large fp32 weight on a CPU where they are faster."""
    return processor.has_mkl_for_others() and half_products.takes_other_forms(x, weight, fewest)


def _padded(x: Tensor) -> Tensor:
    """``x``, padded with zero rows to a multiple of the width."""
    missing = -len(x) % _WIDTH if len(x) > _WIDTH // 2 else 0
    return torch.cat((x, x.new_zeros(missing, x.shape[1]))) if missing else x


def _slices(weight: Tensor) -> Iterator[slice]:
    for first in range(0, len(weight), SLICE):
        yield slice(first, first + SLICE)


def _sliced(
    multiply: Callable[[Tensor, Tensor, Tensor | None, Tensor], None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
) -> Tensor:
    """``[rows, M]``: the first rows of ``x`` times the weight, slice by slice."""
    out = empty((rows, len(weight)), x.dtype, x.device)
    for own in _slices(weight):
        multiply(x, weight[own], None if bias is None else bias[own], out[:, own])
    return out


def _multiply_weight(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Weight times rows; ``x`` may have more rows than ``out``."""
    product = torch.mm(weight, x.t()).t()[: len(out)]
    if bias is None:
        out.copy_(product)
    else:
        torch.add(product, bias, out=out)


def _multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Rows times weight."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _multiply_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight times a single row."""
    count = gcd(len(weight), PARTS)
    parts = weight.view(count, -1, weight.shape[1])
    product = torch.bmm(parts, x.t().expand(count, -1, 1)).view(1, -1)
    return product if bias is None else product.add_(bias)
