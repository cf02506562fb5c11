"""The operations on rows that are chosen on the device, as units of work.

Each is called twice: with the first half of the rows chosen, and with none, where its programs exit
early. So tuning minimizes the mean of the two, above all by the number of programs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import Maker
from benchmarks.gpu.works import (
    Outcome,
    Work,
    WorkMaker,
    projection_of,
    written,
)
from fastskip.ops.contracts import Bounds, Term
from fastskip.ops.routes import Agreement, Group, Move, Route, Score, Trace, Verdict


def project(make: Maker, rows: int) -> Work:
    own = replace(projection_of(make, rows), leaves_all=False)
    h, (some, none), running = make.noise(rows, make.widths.hidden), *_flags(make, rows)

    def run(ops: Any) -> Outcome:
        queries = ops.project_append(h, [own], chosen=ops.choose_rows(some))[0]
        ops.project_append(h, [own], chosen=ops.choose_rows(none))
        return [queries[:running]]

    return _of(rows, [own.linear.weight], run, entries=lambda: written(own))


def attend_step(make: Maker, rows: int) -> Work:
    size, pages, reach = make.widths, make.pages(rows), make.step_reach(rows)
    (some, none), running = _flags(make, rows)
    queries = make.noise(rows, size.heads, size.head_dim)

    def run(ops: Any) -> Outcome:
        found, _ = (
            ops.attend_step([queries], [replace(reach, runs=runs)], [pages], size.head_dim**-0.5)
            for runs in (some, none)
        )
        return [found[0][:running]]

    pairs = running * (size.context + 1)
    nbytes = 2 * pairs * size.groups * size.head_dim * make.dtype.itemsize
    return Work(run, nbytes, 4 * pairs * size.heads * size.head_dim)


def add_output(make: Maker, rows: int) -> Work:
    """With a decision in the same launch."""
    return _add(make, rows, make.widths.heads * make.widths.head_dim, rides=True)


def add_down(make: Maker, rows: int) -> Work:
    return _add(make, rows, make.widths.ffn, rides=False)


def feed(make: Maker, rows: int) -> Work:
    part, h = make.feed(), make.noise(rows, make.widths.hidden)
    (some, none), running = _flags(make, rows)

    def run(ops: Any) -> Outcome:
        found = ops.feed(h, [part], chosen=ops.choose_rows(some))[0]
        ops.feed(h, [part], chosen=ops.choose_rows(none))
        return [found[:running]]

    return _of(rows, [part.linear.weight], run)


def project_feed(make: Maker, rows: int) -> Work:
    """Both first halves of a parallel block."""
    own, part = replace(projection_of(make, rows), leaves_all=False), make.feed()
    h, (some, none), running = make.noise(rows, make.widths.hidden), *_flags(make, rows)

    def run(ops: Any) -> Outcome:
        some_too, none_too = map(ops.choose_rows, (some, none))
        queries, fed = ops.project_append_feed(h, own, part, chosen=(some_too, some_too))
        ops.project_append_feed(h, own, part, chosen=(none_too, none_too))
        return [queries[:running], fed[:running]]

    return _of(rows, [own.linear.weight, part.linear.weight], run, entries=lambda: written(own))


def route(make: Maker, rows: int) -> Work:
    """Advances the trace; rows decide individually."""
    h, found = make.noise(rows, make.widths.hidden), torch.zeros(rows, 2, device=make.device)
    trace = Trace(make.noise(rows, make.widths.hidden), found)
    vector = make.noise(make.widths.hidden, scale=make.widths.hidden**-0.5).float()
    verdicts = [
        _verdict(make, rows, Score.LINEAR, weight=vector),
        _verdict(make, rows, Score.COSINE),
    ]
    taken = replace(_route(make, rows, verdicts), trace=trace, move=Move.NEXT)

    def run(ops: Any) -> Outcome:
        ops.route(h, taken)
        return [verdict.runs for verdict in verdicts]

    return Work(run, 3 * h.nbytes)


def decide(make: Maker, rows: int) -> Work:
    """Rows of a sequence decide together."""
    h = make.noise(rows, make.widths.hidden)
    vector = make.noise(make.widths.hidden, scale=make.widths.hidden**-0.5).float()
    own = {"group": Group.SEQUENCE, "agreement": Agreement.MEAN}
    verdict = _verdict(make, rows, Score.LINEAR, weight=vector, **own)
    taken = _route(make, rows, [verdict])

    def run(ops: Any) -> Outcome:
        ops.route(h, taken)
        return [verdict.runs]

    return Work(run, h.nbytes)


def place_entries(make: Maker, rows: int) -> Work:
    (some, _), _ = _flags(make, rows)
    order, counts = make.integers(range(rows)), make.integers([0])
    bounds = Bounds.of((0, rows), order.device)

    def run(ops: Any) -> Outcome:
        counts.zero_()
        return [*ops.place_entries(some, order, bounds, counts), counts]

    return Work(run, 16 * rows)


DECODE_ROUTED: dict[str, WorkMaker] = {
    "routed: project_append": project,
    "routed: attend_step": attend_step,
    "routed: add_output, decision": add_output,
    "routed: feed": feed,
    "routed: add_down": add_down,
    "routed: project_feed": project_feed,
    "routed: route": route,
}
PREFILL_ROUTED: dict[str, WorkMaker] = {
    "routed: project_append": project,
    "routed: feed": feed,
    "routed: add_down": add_down,
    "routed: route": route,
    "routed: decide": decide,
    "routed: place_entries": place_entries,
}


def _flags(make: Maker, rows: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Flags for the first half of the rows, flags for none, and how many rows the half has."""
    running = -(-rows // 2)
    flags = [1] * running + [0] * (rows - running)
    return (make.integers(flags), make.integers([0] * rows)), running


def _of(rows: int, weights: list[Tensor], run: Any, entries: Any = list) -> Work:
    flops = sum(2 * -(-rows // 2) * weight.numel() for weight in weights)
    return Work(run, sum(weight.nbytes for weight in weights), flops, entries=entries)


def _add(make: Maker, rows: int, width: int, *, rides: bool) -> Work:
    term = Term(make.noise(rows, width), make.linear(make.widths.hidden, width))
    h, (some, none), _ = make.noise(rows, make.widths.hidden), *_flags(make, rows)
    verdict = _verdict(make, rows, Score.RANDOM)
    then = _route(make, rows, [verdict]) if rides else None

    def run(ops: Any) -> Outcome:
        for runs in (some, none):
            ops.add_terms_(h, [term], chosen=[ops.choose_rows(runs)], then=then)
        return [h, verdict.runs]

    return _of(rows, [term.linear.weight], run)


def _verdict(make: Maker, rows: int, score: Score, **terms: Any) -> Verdict:
    runs, every = make.integers([0] * rows), make.integers([1] * rows)
    bar = -0.5 if score is Score.RANDOM else 0.0
    return Verdict(score=score, bar=bar, salt=7, runs=runs, candidates=every, **terms)


def _route(make: Maker, rows: int, verdicts: list[Verdict]) -> Route:
    """In a step each row is a sequence; a prompt is one sequence."""
    is_prompt = rows == make.widths.context
    sequences = make.integers([0] * rows if is_prompt else range(rows))
    arrivals = make.integers([0])
    return Route(verdicts, make.integers(range(rows)), sequences, None, Move.NONE, [], arrivals)
