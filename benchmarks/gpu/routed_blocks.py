"""What a guarded block costs that runs, and one that is skipped, with early exits, IF nodes and
loops: the cell ``routing.blocks``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu.cells import Setting, is_lost
from benchmarks.gpu.inputs import TINY, Widths
from benchmarks.gpu.results import Values
from benchmarks.gpu.routed_policies import KIND_OF, policy_of, router
from benchmarks.gpu.routed_stack import Stack, microseconds, programs_at_most
from fastskip.generation.guarding import Guarding
from fastskip.ops.overlap import Overlap, can_overlap

PROGRAMS = (132, 264, 528, 1056)
DEPTH = 8
"""Layers of a step whose blocks are timed."""
TURNS = (1, 2, 4, 8)
"""Layers per turn of a loop."""


def blocks(setting: Setting, widths: Widths) -> Values:
    """Microseconds per block of a decode step at batch 1, in a graph of many."""
    widths = TINY if setting.is_tiny else widths
    depth = 2 if setting.is_tiny else DEPTH
    stack = Stack(setting, widths, depth)
    found: dict[str, float] = {"dense": microseconds(setting, stack.step(policy_of()), depth)}
    notes: dict[str, str] = {}
    for kv in ("omit", "project"):
        for programs in (None,) if setting.is_tiny else (None, *PROGRAMS):
            for rate, does in ((0.0, "runs"), (1.0, "is passed by")):
                own = f"{kv}: {does}, early exits"
                own += "" if programs is None else f", at most {programs} programs"
                with programs_at_most(programs, setting.device):
                    step = stack.step(policy_of(router(rate, kv)))
                    found[own] = microseconds(setting, step, depth)
        for (rate, does), way in itertools.product(
            ((0.0, "runs"), (1.0, "is passed by")), _node_ways(setting, kv)
        ):
            try:
                policy = policy_of(router(rate, kv))
                step = stack.step(policy, way.guarding, way.turns, way.overlap)
                found[f"{kv}: {does}, {way.label}"] = microseconds(setting, step, depth)
            except Exception as error:
                if is_lost(setting.device):
                    raise
                notes[f"{kv}, {way.label}"] = f"{type(error).__name__}: {error}"
    skipped = {"layers": ":", "tokens": "all", "skip": ["block"], "kv": "project"}
    step = stack.step(policy_of(rules=[skipped]))
    found["project: skipped by plan"] = microseconds(setting, step, depth)
    return {"widths": widths.name, "us_per_block": found, "notes": notes}


class NodeWay(NamedTuple):
    """A way to run a step with conditional graph nodes."""

    label: str
    guarding: Guarding
    turns: int = 1
    overlap: Overlap = Overlap.NONE


def _node_ways(setting: Setting, kv: str) -> Iterator[NodeWay]:
    """IF nodes and, where skipped rows leave no cache entries, loops."""
    yield NodeWay(KIND_OF[Guarding.CONDITIONAL], Guarding.CONDITIONAL)
    if kv != "omit":
        return
    for turns in TURNS[:1] if setting.is_tiny else TURNS:
        yield NodeWay(f"loop, {turns} a turn", Guarding.HOPS, turns)
    if can_overlap(setting.device):
        yield NodeWay("loop, 4 a turn, launches overlap", Guarding.HOPS, 4, Overlap.START)
