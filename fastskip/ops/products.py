"""``x @ weight.T + bias`` on a CPU in fp32: the same sums, asked of the library in another form.

Called with all of a large weight, the library copies it into another order first, which for some
rows costs more than the product itself, and then finds it in the cache no more. So the weight is
taken slice by slice; and while rows are few, it is the first factor, ``(weight @ x.T).T``, which
several threads share better. A single row, of which the plain call makes one thread's work at half
of a thread's bandwidth, is a batch of small products with parts of the weight: they go to all
threads and read the weight as it lies. ``benchmarks/products.py`` measures this against the plain
call; the bounds below are from there. Between the two products of an FFN rows stay the columns that
the first one leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, Linear
from fastskip.ops.reference import activate, wants_gradient

LARGE, LARGE_FOR_ONE = 1 << 20, 1 << 15
"""Weights from which on the order shows; smaller ones stay in the cache. For a single row, those
that take longer than a call does."""
FEWEST, FEW = 16, 256
"""Rows up to which the weight is the first factor; in an FFN, of more than the fewest."""
NOT_WITH_AVX512 = range(7, 9)
"""Rows that several threads leave to the plain call there; one thread leaves all but two."""
MANY = 2048
"""Rows from which on the product takes so long that nothing else shows."""
SLICE = 1024
"""Out features of a slice."""
PARTS = 64
"""Parts that a weight is read in for a single row, at most: threads share them."""
_WIDTH = 16
"""Rows that are computed together, if there are more than half as many."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, E] x [M, E] -> [N, M]``, contiguous; ``bias [M]``."""
    rows = len(x)
    if rows == 1 and _is_ours(x, weight, LARGE_FOR_ONE):
        return _multiply_row(x, weight, bias)
    if not (1 < rows < MANY and _is_ours(x, weight, LARGE) and _is_quicker(rows)):
        return F.linear(x, weight, bias)
    if len(weight) <= SLICE and (rows > FEW or torch.get_num_threads() == 1):
        return F.linear(x, weight, bias)
    if rows <= FEW:
        return _sliced(_multiply_weight, _filled(x), weight, bias, rows)
    return _sliced(_multiply_rows, x, weight, bias, rows)


def feed_forward(x: Tensor, up: Linear, activation: Activation, down: Linear) -> Tensor:
    """``down(activation(up(x)))``: ``[N, D] -> [N, D]``, contiguous."""
    rows = len(x)
    if not (
        FEWEST < rows <= FEW
        and _is_quicker(rows)
        and _is_ours(x, up.weight, LARGE)
        and _is_ours(x, down.weight, LARGE)
    ):
        return linear(activate(linear(x, up.weight, up.bias), activation), down.weight, down.bias)
    columns = _filled(x).t()
    fed = empty((len(up.weight), columns.shape[1]), x.dtype, x.device)
    for own in _slices(up.weight):
        torch.mm(up.weight[own], columns, out=fed[own])
    if up.bias is not None:
        fed += up.bias[:, None]
    inner = activate(fed.t(), activation)  # which keeps the order in memory
    return _sliced(_multiply_weight, inner, down.weight, down.bias, rows)


def _is_quicker(rows: int) -> bool:
    """Whether the other forms of several rows are: not everywhere with AVX-512, whose plain call
    copies less."""
    if not _has_avx512():
        return True
    return rows <= 2 if torch.get_num_threads() == 1 else rows not in NOT_WITH_AVX512


@cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_ours(x: Tensor, weight: Tensor, fewest: int) -> bool:
    """Whether the other forms are quicker, and nobody asks for gradients or another precision,
    which they have not."""
    return (
        weight.numel() >= fewest
        and x.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not wants_gradient(x, weight)
        and not torch.is_autocast_enabled("cpu")
    )


def _filled(x: Tensor) -> Tensor:
    """``x`` and rows of zeros up to a full width."""
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
    """Weight times rows, of which ``x`` has at least as many as ``out``."""
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
    """Weight times the only row."""
    count = gcd(len(weight), PARTS)
    parts = weight.view(count, -1, weight.shape[1])
    product = torch.bmm(parts, x.t().expand(count, -1, 1)).view(1, -1)
    return product if bias is None else product.add_(bias)
