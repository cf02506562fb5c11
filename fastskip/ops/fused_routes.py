"""Device-side decisions in plain torch: the definition, and the kernels' oracle.

Part of ``ops.fused``, in a file of its own. Letters as in ``ops.routes``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastskip.ops.contracts import Bounds
from fastskip.ops.hops import Field, Hops
from fastskip.ops.routes import (
    EPSILON,
    Agreement,
    Chosen,
    Group,
    Move,
    Route,
    Score,
    Switch,
    Terms,
    Trace,
    Verdict,
    draw,
)

_TINY = 1e-30


def route(h: Tensor, taken: Route) -> None:
    """Updates the trace, then decides; ``h [n, D]`` is the current residual stream."""
    if taken.trace is not None and taken.move is not Move.NONE:
        _move(h, taken)
    for verdict in taken.verdicts:
        _decide(h, taken, verdict)


def begin_hops(h: Tensor, hops: Hops, condition: int = 0) -> None:
    """Makes the first layer of ``hops`` next, for the rows that its flags name; if they name none,
    the first later one that some row runs. There are no graphs here, so no ``condition``."""
    assert not condition
    assert hops.layers[0].home is not None
    hops.runs.copy_(hops.layers[0].home)
    _choose_next(h, hops, 1)


def land(h: Tensor, hops: Hops) -> None:
    """Chooses the next layer after one has run."""
    if hops.trace is not None:
        _move_on(h, hops.trace, [hops.runs])
    hops.runs.zero_()
    _choose_next(h, hops, int(hops.now[Field.LAYER]) + 1)


def measure(before: Tensor, after: Tensor) -> Tensor:
    """Cosine and relative change ``||after - before|| / ||before||`` of rows: ``[n, D] -> [n, 2]``.

    At least in fp32; zero rows have cosine 0 and a huge change, or 0 if they stay zero.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    parts = torch.stack((before, after, after - before), dim=1)
    products = parts @ parts.mT  # all dot products in one operation
    squares = products.diagonal(dim1=1, dim2=2)
    first, second, moved = squares.unbind(1)
    cosine = products[:, 0, 1] / (first * second).sqrt().clamp_min(_TINY)
    change = moved.sqrt() / first.sqrt().clamp_min(_TINY)
    return torch.stack((cosine, change), dim=-1)


def linear_score(h: Tensor, weight: Tensor, bias: float | Tensor) -> Tensor:
    """``weight . h / rms(h) + bias``: ``[n, D] -> [n]``, at least in fp32."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    scale = (wide.square().mean(-1) + EPSILON).rsqrt()
    return wide @ weight.to(wide.dtype) * scale + bias


def choose_rows(runs: Tensor, switch: Switch | None = None) -> Chosen:
    """The rows with a flag of 1, also compacted; there are no graphs here, so no ``switch``."""
    assert switch is None
    order = torch.argsort(1 - runs, stable=True).to(torch.int32)
    return Chosen(runs, order, runs.sum(dtype=torch.int32)[None])


def place_entries(
    held: Tensor, order: Tensor, bounds: Bounds, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Slots of rows that leave entries, where the host does not know which rows do.

    ``held [n]``: 1 where a row leaves one; ``order [n]``: row numbers, sequence by sequence,
    columns ascending; ``bounds``: where each sequence begins in it; ``counts [B]``: entries of each
    sequence, updated in place. Returns ``slots [n]`` (-1 without an entry) and ``limits [n]``
    (entries at or before each row), int32; rows after the last sequence get -1 and 0.
    """
    slots, limits = (torch.full_like(held, fill) for fill in (-1, 0))
    for sequence, (first, last) in enumerate(pairwise(bounds.host)):
        rows = order[first:last].long()
        seen = counts[sequence] + held[rows].cumsum(0, dtype=torch.int32)
        limits[rows] = seen
        slots[rows] = torch.where(held[rows].bool(), seen - 1, -1)
        counts[sequence] += held[rows].sum(dtype=torch.int32)
    return slots, limits


def _move(h: Tensor, taken: Route) -> None:
    trace = taken.trace
    assert trace is not None
    if taken.move is Move.START:
        trace.found[:, 0], trace.found[:, 1] = -math.inf, math.inf
        trace.snapshot.copy_(h)
    else:
        _move_on(h, trace, taken.ran)


def _move_on(h: Tensor, trace: Trace, ran: Sequence[Tensor]) -> None:
    did = torch.ones(len(h), dtype=torch.bool, device=h.device)
    for flags in ran:
        did = did & flags.bool()
    found = measure(trace.snapshot, h).to(trace.found.dtype)
    trace.found.copy_(torch.where(did[:, None], found, trace.found))
    trace.snapshot.copy_(h)


def _choose_next(h: Tensor, hops: Hops, following: int) -> None:
    """Decides on layers from ``following`` on until some row runs; on none if one already does."""
    found = None if hops.trace is None else hops.trace.found
    members = hops.live.nonzero().squeeze(1)
    own = hops.sequences[members], hops.positions[members]
    while following < len(hops.layers) and not hops.runs.any():
        layer = hops.layers[following]
        runs = hops.live
        if layer.terms is not None:
            scores = score(layer.terms, h, hops.positions, found)
            runs = torch.zeros_like(runs)
            runs[members] = (~settle(scores[members], *own, layer.terms)).to(runs.dtype)
        if layer.home is not None:
            layer.home.copy_(runs)
        hops.runs.copy_(runs)
        following += 1
    hops.now.copy_(hops.table[following - 1])


def settle(scores: Tensor, sequences: Tensor, positions: Tensor, terms: Terms) -> Tensor:
    """Which of ``m`` candidates skip: ``[m]`` bool, from their scores, sequences and positions."""
    if terms.capacity is not None:
        return _beyond_capacity(scores, sequences, positions, terms.capacity)
    return agreed(scores, sequences, positions, terms) >= rounded(terms.bar)


@functools.lru_cache(1024)
def rounded(bar: float) -> float:
    """The bar in fp32."""
    return torch.tensor(bar, dtype=torch.float32).item()


def agreed(scores: Tensor, sequences: Tensor, positions: Tensor, terms: Terms) -> Tensor:
    """The score of each candidate's group: ``[m]``."""
    if terms.group is Group.ROW:
        return scores
    numbers = sequences if terms.group is Group.SEQUENCE else torch.zeros_like(sequences)
    return _of_groups(scores, numbers, positions, terms)


def score(terms: Terms, h: Tensor, positions: Tensor, found: Tensor | None) -> Tensor:
    """How much each row wants to skip; ``h [n, D]``, ``positions [n]``, and ``found [n, 2]`` of the
    trace."""
    if terms.score is Score.RANDOM:
        return -draw(positions, terms.salt)
    if terms.score is Score.LINEAR:
        assert terms.weight is not None
        return -linear_score(h, terms.weight, terms.bias)
    assert found is not None
    cosine, change = found.unbind(-1)
    return cosine if terms.score is Score.COSINE else -change


def _decide(h: Tensor, taken: Route, verdict: Verdict) -> None:
    members = verdict.candidates.nonzero().squeeze(1)
    found = None if taken.trace is None else taken.trace.found
    scores = score(verdict, h, taken.positions, found)
    own = taken.sequences[members], taken.positions[members]
    verdict.runs[members] = (~settle(scores[members], *own, verdict)).to(verdict.runs.dtype)


def _of_groups(scores: Tensor, numbers: Tensor, positions: Tensor, terms: Terms) -> Tensor:
    """The score of each row's group."""
    found = scores.clone()
    for number in numbers.unique():
        rows = (numbers == number).nonzero().squeeze(1)
        own = scores[rows]
        if terms.score is Score.RANDOM:
            found[rows] = own[positions[rows].argmax()]
        else:
            found[rows] = own.mean() if terms.agreement is Agreement.MEAN else own.min()
    return found


def _beyond_capacity(
    scores: Tensor, sequences: Tensor, positions: Tensor, capacity: float
) -> Tensor:
    skips = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    for number in sequences.unique():
        rows = (sequences == number).nonzero().squeeze(1)
        by_position = rows[torch.argsort(positions[rows], stable=True)]
        order = by_position[torch.argsort(scores[by_position], stable=True)]
        skips[order[: math.ceil(capacity * len(rows))]] = False
    return skips
