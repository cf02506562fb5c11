"""The fused operations on Triton kernels, and on torch's library products where those are faster.

Imported only when Triton is asked for. Each product asks ``kernels.choice`` who computes it: with
few rows one kernel does all that an operation names; with many, norm, product and what follows are
launches of their own. Shapes and meanings are those of ``ops.fused``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.kernels import feed as feeding
from fastskip.kernels import head as heads
from fastskip.kernels import launch, numerics, parallel, projection, residual
from fastskip.kernels.activation import activate
from fastskip.kernels.addition import add_rows_
from fastskip.kernels.choice import FEW_ROWS, ROW_GEMM, choose_product
from fastskip.kernels.compaction import compact
from fastskip.kernels.copies import copy_entries, read_entries
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.norm import normalize
from fastskip.kernels.rotary import rotate_append
from fastskip.kernels.row_attention import attend_rows
from fastskip.kernels.row_gemm import linear_rows
from fastskip.kernels.sampler import advance, choose, embed
from fastskip.kernels.step_attention import attend_step
from fastskip.ops.contracts import Choice, Feed, Linear, Norm, Projection, Term

__all__ = [
    "activate",
    "add_terms_",
    "advance",
    "apply_terms",
    "attend_rows",
    "attend_step",
    "choose",
    "compact",
    "copy_entries",
    "embed",
    "feed",
    "head_choose",
    "head_logits",
    "normalize",
    "project_append",
    "project_append_feed",
    "read_entries",
    "rotate_append",
]


def project_append(
    h: Tensor, projections: Sequence[Projection], *, index: Tensor | None = None
) -> list[Tensor]:
    """Norm, product, RoPE and K/V append; rotated queries ``[n, H, K]`` of each block."""
    by = _choice(h, index, [projections[0].linear])
    if by == FEW_ROWS:
        return projection.project_append(h, projections, index=index)
    return [_project(normalize(h, each.norm, index=index), each, by) for each in projections]


def feed(
    h: Tensor,
    feeds: Sequence[Feed],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Norm, first product and activation of an FFN; ``[n, F]`` of each block."""
    by = _choice(h, index, [feeds[0].linear])
    if by == FEW_ROWS:
        return feeding.feed(h, feeds, index=index, changes=changes)
    added = [None] * len(feeds) if changes is None else changes
    return [
        _activated(normalize(h, part.norm, index=index, change=change), part, by)
        for part, change in zip(feeds, added, strict=True)
    ]


def project_append_feed(
    h: Tensor, own: Projection, part: Feed, *, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both first halves of a parallel block: queries ``[n, H, K]`` and ``[n, F]``."""
    by = _choice(h, index, [own.linear, part.linear])
    if by == FEW_ROWS:
        return parallel.project_append_feed(h, own, part, index=index)
    x = normalize(h, own.norm, index=index)
    is_shared = own.norm.weight is part.norm.weight and own.norm.bias is part.norm.bias
    other = x if is_shared else normalize(h, part.norm, index=index)
    return _project(x, own, by), _activated(other, part, by)


def add_terms_(
    h: Tensor,
    terms: Sequence[Term],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] = (),
    factor: float = 1.0,
) -> Tensor:
    """``h[index] += factor * (sum of x @ weight.T + bias + sum of changes)``, in place."""
    shape = len(terms[0].linear.weight), max(term.x.shape[1] for term in terms)
    by = choose_product(h.device, len(terms[0].x), shape, is_scattered=index is not None)
    if by == FEW_ROWS:
        return residual.add_terms_(h, terms, index=index, changes=changes, factor=factor)
    refuse_gradients(h=h, **{f"terms[{i}].x": term.x for i, term in enumerate(terms)})
    with torch.no_grad():
        for change in changes:
            add_rows_(h, change, index=index, factor=factor)
        for term in terms:
            if by == ROW_GEMM:
                linear_rows(term.x, term.linear, out=h, out_index=index, onto=True, factor=factor)
            elif index is None:
                launch.note("library_product")
                torch.addmm(h, _known(term.x), term.linear.weight.t(), alpha=factor, out=h)
                if term.linear.bias is not None:
                    add_rows_(h, term.linear.bias.expand(len(h), -1), factor=factor)
            else:
                add_rows_(h, _product(term.x, term.linear, by), index=index, factor=factor)
    return h


def apply_terms(terms: Sequence[Term]) -> list[Tensor]:
    """``x @ weight.T + bias`` of each term: ``[n, D]``."""
    by = _choice(terms[0].x, None, [terms[0].linear])
    if by == FEW_ROWS:
        return residual.apply_terms(terms)
    return [_product(term.x, term.linear, by) for term in terms]


def head_logits(h: Tensor, norm: Norm | None, head: Linear) -> Tensor:
    """The final norm (unless already applied) and the vocabulary product: ``[n, D] -> [n, V]``."""
    by = _choice(h, None, [head])
    if by == FEW_ROWS:
        return heads.head_logits(h, norm, head)
    return _product(h if norm is None else normalize(h, norm), head, by)


def head_choose(h: Tensor, norm: Norm | None, head: Linear, choice: Choice) -> None:
    """``choose`` of the head's logits, which nobody else needs."""
    if _choice(h, None, [head]) == FEW_ROWS:
        heads.head_choose(h, norm, head, choice)
    else:
        choose(head_logits(h, norm, head), choice)


def _choice(x: Tensor, index: Tensor | None, linears: Sequence[Linear]) -> str:
    """Who computes a product that reads rows of ``x``."""
    rows = len(x) if index is None else len(index)
    shape = sum(len(linear.weight) for linear in linears), linears[0].weight.shape[1]
    return choose_product(x.device, rows, shape)


def _project(x: Tensor, own: Projection, by: str) -> Tensor:
    """From normalized rows to rotated queries; keys and values go to the cache."""
    found = _product(x, own.linear, by)
    return rotate_append(found.unflatten(1, (-1, own.head_dim)), own)


def _activated(x: Tensor, part: Feed, by: str) -> Tensor:
    """First product and activation of normalized rows."""
    if by == ROW_GEMM:
        return linear_rows(x, part.linear, activation=part.activation)
    return activate(_product(x, part.linear, by), part.activation)


def _product(x: Tensor, linear: Linear, by: str) -> Tensor:
    if by == ROW_GEMM:
        return linear_rows(x, linear)
    refuse_gradients(x=x)
    launch.note("library_product")
    with torch.no_grad():
        return F.linear(_known(x), linear.weight, linear.bias)


def _known(x: Tensor) -> Tensor:
    """``x``, unless torch would compute on it where kernels cannot."""
    if x.device.type == "cpu" and not numerics.INTERPRETED.value:
        raise ValueError("kernels run on CUDA; on the CPU only if TRITON_INTERPRET was set before")
    return x
