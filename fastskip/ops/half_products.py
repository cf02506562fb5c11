"""``x @ weight.T + bias`` on a CPU in half precision, with the weight as the first factor.

With AMX, torch's library multiplies a large weight by few rows a quarter to a half faster as
``(weight @ x.T).T``, and by a single row as a matrix times a vector. ``benchmarks/products.py``
measures this against the plain call; the bounds below come from there. Between the two products of
an FFN, rows stay in the columns that the first one produces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops import processor
from fastskip.ops.contracts import Activation, Linear
from fastskip.ops.reference import activate, wants_gradient

LARGE, LARGE_FOR_ONE = 1 << 20, 1 << 15
"""Weight elements from which the order of the factors matters, and for a single row."""
FEW = 128
"""Rows up to which the weight comes first."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, E] x [M, E] -> [N, M]``, contiguous; ``bias [M]``."""
    rows = len(x)
    if rows == 1 and _applies(x, weight, LARGE_FOR_ONE):
        row = x[0]
        product = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return product[None]
    if 1 < rows <= FEW and _applies(x, weight, LARGE):
        return _multiply(weight, x.t(), bias).t().contiguous()
    return F.linear(x, weight, bias)


def feed_forward(x: Tensor, up: Linear, activation: Activation, down: Linear) -> Tensor:
    """``down(activation(up(x)))``: ``[N, D] -> [N, D]``, contiguous."""
    if 1 < len(x) <= FEW and _applies(x, up.weight, LARGE) and _applies(x, down.weight, LARGE):
        fed = _multiply(up.weight, x.t(), up.bias)
        inner = activate(fed.t(), activation)  # keeps the memory layout
        return _multiply(down.weight, inner.t(), down.bias).t().contiguous()
    return linear(activate(linear(x, up.weight, up.bias), activation), down.weight, down.bias)


def _applies(x: Tensor, weight: Tensor, fewest: int) -> bool:
    """Whether the weight may come first: a large one on a CPU where that is faster."""
    return processor.has_amx(x.dtype) and takes_other_forms(x, weight, fewest)


def takes_other_forms(x: Tensor, weight: Tensor, fewest: int) -> bool:
    """Whether other forms than the plain call support a product, of a weight that is large enough:
    on a CPU, without gradients, autocast or a cast."""
    return (
        weight.numel() >= fewest
        and x.dtype == weight.dtype
        and weight.device.type == "cpu"
        and not wants_gradient(x, weight)
        and not torch.is_autocast_enabled("cpu")
    )


def _multiply(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """``[M, E] x [E, N] -> [M, N]``, rounded once."""
    if bias is None:
        return torch.mm(weight, columns)
    return torch.addmm(bias[:, None], weight, columns)
