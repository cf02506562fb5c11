"""The fused operations on Triton kernels, and on torch's library GEMMs where those are faster.

Imported only when Triton is selected. ``kernels.choice`` decides what computes each product: with
few rows, one kernel does everything that an operation names; with many, norm, product and what
follows are separate launches. Few rows chosen on the device are marked by flags alone; many, also
by an index and a count, which many-row products read. Shapes and meanings are those of
``ops.fused``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.kernels import feed as feeding
from fastskip.kernels import head as heads
from fastskip.kernels import launch, numerics, parallel, projection, residual
from fastskip.kernels.activation import activate
from fastskip.kernels.addition import add_rows_
from fastskip.kernels.choice import FEW_ROWS, LIBRARY, ROW_GEMM, choose_product
from fastskip.kernels.compaction import compact
from fastskip.kernels.copies import copy_entries, read_entries
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.hops import begin_hops
from fastskip.kernels.norm import normalize
from fastskip.kernels.riding import can_ride
from fastskip.kernels.rotary import rotate_append
from fastskip.kernels.routing import place_entries, route
from fastskip.kernels.row_attention import attend_rows
from fastskip.kernels.row_gemm import linear_rows
from fastskip.kernels.sampler import advance, choose, embed
from fastskip.kernels.step_attention import attend_step
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Choice, Feed, HalfNorm, Linear, Norm, Projection, Term
from fastskip.ops.hops import Field, Hops
from fastskip.ops.routes import Chosen, Route, Switch

__all__ = [
    "activate",
    "add_terms_",
    "add_terms_and_halve_",
    "advance",
    "apply_terms",
    "attend_rows",
    "attend_step",
    "begin_hops",
    "choose",
    "choose_rows",
    "compact",
    "copy_entries",
    "embed",
    "feed",
    "head_choose",
    "head_logits",
    "hop",
    "normalize",
    "place_entries",
    "project_append",
    "project_append_feed",
    "read_entries",
    "rotate_append",
    "route",
]

FEW_CHOSEN = 64
"""Up to this many rows, few-row kernels compute the chosen ones, and read flags."""


def project_append(
    h: Tensor,
    projections: Sequence[Projection],
    *,
    index: Tensor | None = None,
    chosen: Chosen | None = None,
    half: HalfNorm | None = None,
    arrivals: Tensor | None = None,
) -> list[Tensor]:
    """Norm, product, RoPE and K/V append; rotated queries ``[n, H, K]`` of each block."""
    by = _choice(h, index, [projections[0].linear], chosen)
    if by == FEW_ROWS and projections[0].head_norms is not None:
        return _project_normed(h, projections, index, chosen, half, arrivals)
    if by == FEW_ROWS:
        return projection.project_append(
            h, projections, index=index, chosen=chosen, half=half, arrivals=arrivals
        )
    if chosen is not None:
        return [_project_chosen(h, each, chosen) for each in projections]
    return [_project(normalize(h, each.norm, index=index), each, by) for each in projections]


def feed(
    h: Tensor,
    feeds: Sequence[Feed],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] | None = None,
    chosen: Chosen | None = None,
    arrivals: Tensor | None = None,
    half: HalfNorm | None = None,
) -> list[Tensor]:
    """Norm, first product and activation of an FFN; ``[n, F]`` of each block."""
    by = _choice(h, index, [feeds[0].linear], chosen)
    if by == FEW_ROWS:
        return feeding.feed(
            h, feeds, index=index, changes=changes, chosen=chosen, half=half, arrivals=arrivals
        )
    added = [None] * len(feeds) if changes is None else changes
    pairs = zip(feeds, added, strict=True)
    if chosen is not None:
        return [_feed_chosen(h, part, change, chosen) for part, change in pairs]
    return [
        _activated(normalize(h, part.norm, index=index, change=change), part, by, arrivals)
        for part, change in pairs
    ]


def project_append_feed(
    h: Tensor,
    own: Projection,
    part: Feed,
    *,
    index: Tensor | None = None,
    chosen: tuple[Chosen | None, Chosen | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Both first halves of a parallel block: queries ``[n, H, K]`` and ``[n, F]``."""
    by = _choice(h, index, [own.linear, part.linear], *chosen)
    if by == FEW_ROWS and own.head_norms is None:
        return parallel.project_append_feed(h, own, part, index=index, chosen=chosen)
    if by == FEW_ROWS or any(each is not None for each in chosen):
        queries = project_append(h, [own], index=index, chosen=chosen[0])[0]
        return queries, feed(h, [part], index=index, chosen=chosen[1])[0]
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
    chosen: Sequence[Chosen | None] = (),
    then: Route | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """``h[index] += factor * (sum of x @ weight.T + bias + sum of changes)``, in place."""
    longest = max(terms, key=lambda term: term.x.shape[1])
    by = _choice(terms[0].x, None, [longest.linear], *chosen, is_scattered=index is not None)
    rides = by == FEW_ROWS and then is not None and can_ride(then, len(h))
    if by == FEW_ROWS:
        carried = then if rides else None
        residual.add_terms_(
            h,
            terms,
            index=index,
            changes=changes,
            factor=factor,
            chosen=chosen,
            then=carried,
            arrivals=arrivals,
        )
    else:
        for change in changes:
            add_rows_(h, change, index=index, factor=factor)
        for term, own in zip(terms, chosen or [None] * len(terms), strict=True):
            _add_term(h, term, index, factor, own, by, arrivals)
    if then is not None and not rides:
        route(h, then)
    return h


def add_terms_and_halve_(
    h: Tensor,
    terms: Sequence[Term],
    norm: Norm,
    *,
    factor: float = 1.0,
    arrivals: Tensor | None = None,
) -> HalfNorm | None:
    """``add_terms_(h, terms)``, and half of ``norm`` of the result, if that takes one launch."""
    longest = max(terms, key=lambda term: term.x.shape[1])
    if HalfNorm.is_of(norm, h.dtype) and _choice(h, None, [longest.linear]) == FEW_ROWS:
        return residual.add_terms_and_halve_(h, terms, norm, factor=factor, arrivals=arrivals)
    add_terms_(h, terms, factor=factor, arrivals=arrivals)
    return None


def apply_terms(terms: Sequence[Term]) -> list[Tensor]:
    """``x @ weight.T + bias`` of each term: ``[n, D]``."""
    by = _choice(terms[0].x, None, [terms[0].linear])
    if by == FEW_ROWS:
        return residual.apply_terms(terms)
    return [_product(term.x, term.linear, by) for term in terms]


def hop(h: Tensor, hops: Hops, condition: int = 0) -> None:
    """Runs the next layer in place, for the rows that it is for; then chooses the one after it."""
    own, chosen, now = hops.layers[0], Chosen(hops.runs), hops.now
    queries = projection.project_append(h, [own.projection], chosen=chosen, now=now)
    reach = replace(own.reach, runs=hops.runs)
    mixed = attend_step(queries, [reach], [own.pages], hops.scale, now=now)[0]
    first = Term(mixed, own.output)
    residual.add_terms_(h, [first], chosen=[chosen], loop=hops, field=Field.OUTPUT)
    fed = feeding.feed(h, [own.feed], chosen=chosen, now=now)[0]
    last = Term(fed, own.down)
    residual.add_terms_(
        h, [last], chosen=[chosen], loop=hops, field=Field.DOWN, condition=condition
    )


def head_logits(
    h: Tensor, norm: Norm | None, head: Linear, *, half: HalfNorm | None = None
) -> Tensor:
    """The final norm (unless already applied) and the vocabulary product: ``[n, D] -> [n, V]``."""
    by = _choice(h, None, [head])
    if by == FEW_ROWS:
        return heads.head_logits(h, norm, head, half=half)
    return _product(h if norm is None else normalize(h, norm), head, by)


def head_choose(
    h: Tensor, norm: Norm | None, head: Linear, choice: Choice, *, half: HalfNorm | None = None
) -> None:
    """``choose`` from the head's logits, which nothing else needs."""
    if _choice(h, None, [head]) == FEW_ROWS:
        heads.head_choose(h, norm, head, choice, half=half)
    else:
        choose(head_logits(h, norm, head), choice)


def choose_rows(runs: Tensor, switch: Switch | None = None) -> Chosen:
    """The rows with a flag of 1; out of few rows by flags alone, out of many also by an index.

    ``switch``, only with many: the node that selects its body by their number.
    """
    if len(runs) <= FEW_CHOSEN:
        return Chosen(runs)
    return Chosen(runs, *compact(runs, switch=switch))


def _choice(
    x: Tensor,
    index: Tensor | None,
    linears: Sequence[Linear],
    *chosen: Chosen | None,
    is_scattered: bool = False,
) -> str:
    """What computes a product that reads rows of ``x``; with chosen rows by index, all of its rows.

    Few-row kernels read flags, and nothing else does.
    """
    given = [each for each in chosen if each is not None]
    if given and given[0].index is None:
        return FEW_ROWS
    if given and given[0].bound is not None:
        return LIBRARY
    rows = len(x) if index is None else len(index)
    shape = sum(len(linear.weight) for linear in linears), linears[0].weight.shape[1]
    by = choose_product(x.device, rows, shape, is_scattered=is_scattered)
    return LIBRARY if given and by == FEW_ROWS else by


def _project(x: Tensor, own: Projection, by: str) -> Tensor:
    """From normalised rows to rotated queries; keys and values go to the cache."""
    found = _product(x, own.linear, by)
    return rotate_append(found.unflatten(1, (-1, own.head_dim)), own)


def _project_normed(
    h: Tensor,
    projections: Sequence[Projection],
    index: Tensor | None,
    chosen: Chosen | None,
    half: HalfNorm | None = None,
    arrivals: Tensor | None = None,
) -> list[Tensor]:
    """Few rows of a model with head norms: few-row kernels split a head across programs, so a
    separate launch normalises and rotates heads."""
    own = projections[0]
    if chosen is not None and own.leaves_all and own.pages is not None and own.heads:
        return [_project_apart(h, each, chosen) for each in projections]
    plain = [replace(each, rotation=None, pages=None, head_norms=None) for each in projections]
    found = projection.project_append(
        h, plain, index=index, chosen=chosen, half=half, arrivals=arrivals
    )
    runs = None if chosen is None else chosen.runs
    return [
        rotate_append(heads, each, runs=runs)
        for heads, each in zip(found, projections, strict=True)
    ]


def _project_apart(h: Tensor, own: Projection, chosen: Chosen) -> Tensor:
    """Queries of the chosen rows, and cache entries of all."""
    width = own.heads * own.head_dim
    queries = replace(own, linear=own.linear.rows(0, width), pages=None)
    entries = replace(own, linear=own.linear.rows(width))
    _project_normed(h, [entries], None, None)
    return _project_normed(h, [queries], None, chosen)[0]


def _project_chosen(h: Tensor, own: Projection, chosen: Chosen) -> Tensor:
    """Rotated queries of chosen rows; keys and values of these, or of all, go to the cache."""
    index, count = chosen.index, chosen.count
    if chosen.bound is not None:
        x = normalize(h, own.norm, index=index, count=count)
        found = _product(x, own.linear, LIBRARY).unflatten(1, (-1, own.head_dim))
        return rotate_append(found, own, chosen=chosen)
    heads = empty((len(h), len(own.linear.weight)), h.dtype, h.device)
    if own.pages is None or not own.leaves_all:
        x = normalize(h, own.norm, index=index, count=count)
        linear_rows(x, own.linear, out=heads, out_index=index, count=count)
    else:
        x, width = normalize(h, own.norm), own.heads * own.head_dim
        queries, entries = own.linear.rows(0, width), own.linear.rows(width)
        _product(x, entries, _choice(x, None, [entries], chosen), out=heads[:, width:])
        linear_rows(x, queries, index=index, out=heads[:, :width], out_index=index, count=count)
    return rotate_append(heads.unflatten(1, (-1, own.head_dim)), own, runs=chosen.runs)


def _activated(x: Tensor, part: Feed, by: str, arrivals: Tensor | None = None) -> Tensor:
    """First product and activation of normalised rows."""
    if by == ROW_GEMM:
        return linear_rows(x, part.linear, activation=part.activation, arrivals=arrivals)
    return activate(_product(x, part.linear, by), part.activation)


def _feed_chosen(h: Tensor, part: Feed, change: Tensor | None, chosen: Chosen) -> Tensor:
    """Norm, first product and activation of chosen rows: ``[n, F]`` in the order of ``h``, or of
    the index if there is a bound."""
    index = chosen.index
    if chosen.bound is not None:
        assert change is None
        x = normalize(h, part.norm, index=index, count=chosen.count)
        return _activated(x, part, LIBRARY)
    if change is None:
        x, index = normalize(h, part.norm, index=index, count=chosen.count), None
    else:
        # In the order of h, not of the index.
        x = normalize(h, part.norm, change=change)
    return linear_rows(
        x,
        part.linear,
        index=index,
        out=empty((len(h), part.width), h.dtype, h.device),
        out_index=chosen.index,
        count=chosen.count,
        activation=part.activation,
    )


def _add_term(
    h: Tensor,
    term: Term,
    index: Tensor | None,
    factor: float,
    chosen: Chosen | None,
    by: str,
    arrivals: Tensor | None,
) -> None:
    """``h[index] += factor * (x @ weight.T + bias)``, of all rows of ``x`` or of chosen ones."""
    if chosen is not None and chosen.bound is not None:
        found = _product(term.x, term.linear, LIBRARY)
        add_rows_(h, found, index=chosen.index, count=chosen.count, factor=factor)
    elif chosen is not None:
        linear_rows(
            term.x,
            term.linear,
            index=chosen.index,
            out=h,
            out_index=chosen.index,
            count=chosen.count,
            onto=True,
            factor=factor,
        )
    elif by == ROW_GEMM:
        linear_rows(
            term.x,
            term.linear,
            out=h,
            out_index=index,
            onto=True,
            factor=factor,
            arrivals=arrivals,
        )
    elif index is not None:
        add_rows_(h, _product(term.x, term.linear, by), index=index, factor=factor)
    else:
        refuse_gradients(h=h, x=term.x)
        launch.note("library_product")
        with torch.no_grad():
            torch.addmm(h, _runnable(term.x), term.linear.weight.t(), alpha=factor, out=h)
        if term.linear.bias is not None:
            # Detached, since a bias may want gradients elsewhere.
            add_rows_(h, term.linear.bias.detach().expand(len(h), -1), factor=factor)


def _product(x: Tensor, linear: Linear, by: str, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, into ``out`` if that is given."""
    if by == ROW_GEMM:
        return linear_rows(x, linear, out=out)
    refuse_gradients(x=x)
    launch.note("library_product")
    with torch.no_grad():
        if out is None:
            return F.linear(_runnable(x), linear.weight, linear.bias)
        if linear.bias is None:
            return torch.mm(_runnable(x), linear.weight.t(), out=out)
        return torch.addmm(linear.bias, _runnable(x), linear.weight.t(), out=out)


def _runnable(x: Tensor) -> Tensor:
    """``x``; raises where torch could compute on it but kernels cannot."""
    if x.device.type == "cpu" and not numerics.INTERPRETED.value:
        raise ValueError("kernels run on CUDA; on the CPU only with TRITON_INTERPRET=1 set before")
    return x
