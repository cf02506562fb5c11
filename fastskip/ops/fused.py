"""The fused operations in plain torch: what each kernel computes, step by step.

They are the kernels' oracle, and they run the device executor on any device (``impl="torch"``).
Clarity comes before speed. Letters as in ``ops.contracts``; an ``index [n]`` selects rows of ``h``;
``None`` takes all of them, in order. With ``chosen`` (which excludes ``index``) only the rows that
it names run, and all tensors of rows are in the order of ``h``; what they hold for other rows is
unspecified. Decisions themselves: ``ops.fused_routes``; attention: ``ops.fused_entries``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.allocate import empty
from fastskip.ops.contracts import (
    Choice,
    Feed,
    HalfNorm,
    Linear,
    Norm,
    Projection,
    Term,
)
from fastskip.ops.fused_entries import (
    attend_rows,
    attend_step,
    copy_entries,
    read_entries,
    write_entries,
)
from fastskip.ops.fused_routes import begin_hops, choose_rows, land, place_entries, route
from fastskip.ops.hops import Field, Hops
from fastskip.ops.reference import activate
from fastskip.ops.routes import Chosen, Route

__all__ = [
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
    "route",
]


def normalize(
    h: Tensor, norm: Norm, *, index: Tensor | None = None, change: Tensor | None = None
) -> Tensor:
    """``norm(h[index] + change)``: ``[n, D]``; ``h`` is not written."""
    x = _rows(h, index)
    x = x if change is None else x + change
    if norm.is_centred:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.epsilon)


def halve(h: Tensor, norm: Norm) -> HalfNorm:
    """The first half of a norm of ``h [n, D]``."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return HalfNorm(norm, h * norm.weight, h.to(wide).square().mean(1, keepdim=True))


def finish(half: HalfNorm) -> Tensor:
    """The second half: ``[n, D]``."""
    root = torch.rsqrt(half.squares.sum(1, keepdim=True) + half.norm.epsilon)
    return (half.rows * root).to(half.rows.dtype)


def linear(x: Tensor, weights: Linear) -> Tensor:
    """``[n, E] -> [n, M]``."""
    return F.linear(x, weights.weight, weights.bias)


def rotate_append(heads: Tensor, projection: Projection) -> Tensor:
    """Applies head norms, if any, and RoPE to ``heads [n, H + 2G, K]`` (queries, keys, values), and
    stores the entries.

    Returns the rotated queries ``[n, H, K]``. Hugging Face's half-split form: element ``i`` is
    paired with element ``i + K/2``.
    """
    targets, pages, rotation = projection.targets, projection.pages, projection.rotation
    queries = projection.heads
    groups = 0 if pages is None else pages.groups
    turned = heads[:, : queries + groups]
    norms = projection.head_norms
    if norms is not None:
        parts = turned.split((queries, groups), dim=1)
        both = zip(parts, (norms.queries, norms.keys), strict=True)
        turned = torch.cat([normalize(part, norm) for part, norm in both], dim=1)
    if rotation is not None:
        cosine = rotation.cosine[targets.positions.long(), None]
        sine = rotation.sine[targets.positions.long(), None]
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    if pages is not None:
        write_entries(
            pages, targets.sequences, targets.slots, turned[:, queries:], heads[:, -groups:]
        )
    return turned[:, :queries]


def project_append(
    h: Tensor,
    projections: Sequence[Projection],
    *,
    index: Tensor | None = None,
    chosen: Chosen | None = None,
    half: HalfNorm | None = None,
    arrivals: Tensor | None = None,
) -> list[Tensor]:
    """Norm, product, RoPE and K/V append, of one block or of the two blocks of a pair.

    Returns the rotated queries of each, ``[n, H, K]`` (``H`` may be 0). Rows that are not
    ``chosen`` leave entries if the projection ``leaves_all``. ``half``: the norm, if already half
    applied; for one block that all rows run. ``arrivals``: as for ``feed``.
    """
    found = []
    for projection in projections:
        normed = normalize(h, projection.norm, index=index) if half is None else finish(half)
        x = linear(normed, projection.linear)
        heads = x.view(len(x), -1, projection.head_dim)
        if chosen is not None and not projection.leaves_all:
            slots = torch.where(chosen.runs.bool(), projection.targets.slots, -1)
            projection = replace(projection, targets=replace(projection.targets, slots=slots))
        # Queries are in the order of h, with or without a bound.
        found.append(_only(rotate_append(heads, projection), chosen))
    return found


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
    """Norm, first product and activation of an FFN, of one block or of the two of a pair.

    ``changes``: what each block adds to ``h`` before its norm, ``[n, D]`` each. Returns
    ``[n, F]`` each. ``arrivals``: int32 scratch of ``ARRIVALS`` zeros, which is left zero; with it
    kernels may split the work differently. ``half``: as for ``project_append``; not with
    ``changes``.
    """
    found = []
    for number, part in enumerate(feeds):
        change = None if changes is None else changes[number]
        normed = finish(half) if half else normalize(h, part.norm, index=index, change=change)
        x = linear(normed, part.linear)
        active = _only(activate(x, part.activation), chosen)
        if chosen is not None and chosen.bound is not None:
            active = _rows(active, chosen.index)
        found.append(active)
    return found


def project_append_feed(
    h: Tensor,
    projection: Projection,
    part: Feed,
    *,
    index: Tensor | None = None,
    chosen: tuple[Chosen | None, Chosen | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Both first halves of a parallel block, which read the same rows: queries and ``[n, F]``.

    ``chosen``: the rows that attend, and those that run the FFN.
    """
    queries = project_append(h, [projection], index=index, chosen=chosen[0])[0]
    return queries, feed(h, [part], index=index, chosen=chosen[1])[0]


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
    """``h[index] += factor * (sum of x @ weight.T + bias + sum of changes)``, in place.

    One term: the second half of a sublayer. Two: both second halves of a parallel block, or those
    of a pair, whose attention outputs are ``changes [n, D]``. No row occurs twice in ``index``.
    ``chosen``: the rows of each term, or empty for all rows; not with ``changes``. ``then``:
    decisions on the updated residual stream; needs the complete ``h``. ``arrivals``: as for
    ``feed``.
    """
    found = apply_terms(terms)
    for number, own in enumerate(chosen):
        if own is not None:
            if own.bound is not None:
                found[number] = _spread(found[number], own)
            found[number] = torch.where(own.runs.bool()[:, None], found[number], 0.0)
    total = torch.stack([*found, *changes]).sum(0)
    rows = _rows(h, index) + (total if factor == 1.0 else factor * total)
    if index is None:
        h.copy_(rows)
    else:
        h[index.long()] = rows
    if then is not None:
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
    """``add_terms_(h, terms)``, and the first half of ``norm`` of the updated ``h``.

    ``None`` if the norm has no such half, or if it would take a separate launch.
    """
    add_terms_(h, terms, factor=factor, arrivals=arrivals)
    return halve(h, norm) if HalfNorm.is_of(norm, h.dtype) else None


def apply_terms(terms: Sequence[Term]) -> list[Tensor]:
    """``x @ weight.T + bias`` of each term, ``[n, D]``: the attention outputs of a pair."""
    return [linear(term.x, term.linear) for term in terms]


def hop(h: Tensor, hops: Hops, condition: int = 0) -> None:
    """Runs the next layer in place, for the rows that it is for; then chooses the one after it."""
    assert not condition
    if hops.runs.any():
        own, chosen = hops.layers[int(hops.now[Field.LAYER])], choose_rows(hops.runs)
        queries = project_append(h, [own.projection], chosen=chosen)
        reach = replace(own.reach, runs=hops.runs)
        mixed = attend_step(queries, [reach], [own.pages], hops.scale)[0]
        add_terms_(h, [Term(mixed, own.output)], chosen=[chosen])
        fed = feed(h, [own.feed], chosen=chosen)[0]
        add_terms_(h, [Term(fed, own.down)], chosen=[chosen])
    land(h, hops)


def head_logits(
    h: Tensor, norm: Norm | None, head: Linear, *, half: HalfNorm | None = None
) -> Tensor:
    """The final norm (unless already applied) and the vocabulary product: ``[n, D] -> [n, V]``.

    ``half``: the norm, if already half applied.
    """
    if half is not None:
        return linear(finish(half), head)
    return linear(h if norm is None else normalize(h, norm), head)


def head_choose(
    h: Tensor, norm: Norm | None, head: Linear, choice: Choice, *, half: HalfNorm | None = None
) -> None:
    """``choose`` from the head's logits, which nothing else needs."""
    choose(head_logits(h, norm, head, half=half), choice)


def choose(logits: Tensor, choice: Choice) -> None:
    """Picks the greedy token of each row, and advances the state by one step.

    The first of equal maxima wins. A finished sequence yields ``pad``; one that yields a stop
    token is finished from the next step on.
    """
    tokens = logits.float().argmax(-1)
    tokens = torch.where(choice.unfinished.bool(), tokens, choice.pad)
    if len(choice.stops):
        choice.unfinished.mul_(~torch.isin(tokens, choice.stops))
    step = int(choice.step)
    choice.history[step] = tokens
    choice.tokens.copy_(tokens)
    choice.step.add_(1)
    advance(choice)


def advance(choice: Choice) -> None:
    """Advances counts and positions by one step: all that a step with another sampler needs."""
    choice.counts.add_(choice.grows)
    choice.positions.add_(1)


def embed(
    tokens: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    positions: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """``out[b] = table[tokens[b]]``, plus ``places[positions[b]]`` if given: ``[B] -> [B, D]``.

    ``places [positions, D]``: learned position embeddings; needs ``positions [B]``.
    """
    out.copy_(F.embedding(tokens, table))
    if places is not None:
        assert positions is not None
        out.add_(F.embedding(positions, places))


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``mask [N]`` is true: ``index [N]``, ascending in its first ``count [1]`` elements.

    Both stay on the device; what follows is unspecified.
    """
    rows = mask.bool()
    count = rows.sum(dtype=torch.int32)[None]
    # A stable sort by "not chosen" needs no size on the host.
    index = torch.argsort((~rows).to(torch.int8), stable=True).to(torch.int32)
    return index, count


def _only(found: Tensor, chosen: Chosen | None) -> Tensor:
    """``found`` for the chosen rows; unspecified for the others."""
    if chosen is None:
        return found
    out = empty(tuple(found.shape), found.dtype, found.device)
    rows = chosen.runs.bool()
    out[rows] = found[rows]
    return out


def _spread(found: Tensor, chosen: Chosen) -> Tensor:
    """From the order of the index to the order of all rows, zero elsewhere."""
    assert chosen.index is not None
    out = found.new_zeros(len(chosen.runs), *found.shape[1:])
    out[chosen.index.long()] = found
    return out


def _rows(h: Tensor, index: Tensor | None) -> Tensor:
    return h if index is None else h[index.long()]
