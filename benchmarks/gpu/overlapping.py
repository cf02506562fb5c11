"""Do steps whose launches overlap pay, and are their tokens the same? Against ordinary launches,
in each of the ways in which they can (``ops.overlap``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

import fastskip
from benchmarks.gpu.cells import Cell, Setting
from benchmarks.gpu.end_to_end import N_NEW, Contender, first_call, rounds
from benchmarks.gpu.inputs import SEVEN, TINY, Widths
from benchmarks.gpu.models import load, policies, shape
from benchmarks.gpu.results import Values
from benchmarks.gpu.routing import policy_of, router
from benchmarks.peers import Peer
from benchmarks.shapes import Models, prompts
from fastskip import SkipPolicy
from fastskip.ops.overlap import Overlap

ROUTED = "routed, 50%"
WAYS = {
    Overlap.NONE: "ordinary",
    Overlap.START: "overlapping",
    Overlap.READ: "overlapping, reading ahead",
}


def measure(setting: Setting, widths: Widths, batch: int, names: Sequence[str]) -> Values:
    """Milliseconds a token of each policy, of ordinary launches and of those that overlap.

    What gives other tokens than ordinary launches is not timed, and named among the faults.
    """
    widths, n_new = (TINY, 3) if setting.is_tiny else (widths, N_NEW)
    device = setting.device.type
    both = load(widths, setting.dtype, device, "torch" if setting.is_tiny else None)
    batch = min(batch, 2) if setting.is_tiny else batch
    inputs = prompts(both.hf, shape(widths, device), batch)
    contenders: dict[tuple[str, str], Contender] = {}
    faults: list[str] = []
    try:
        for name, policy in _policies(both, names):
            tokens = None
            for way in WAYS:
                own = _contender(both, name, policy, way)
                first_call(own, inputs, n_new, device)
                assert own.tokens is not None
                tokens = own.tokens if tokens is None else tokens
                if torch.equal(tokens, own.tokens):
                    contenders[name, own.peer.name] = own
                else:
                    faults.append(f"{own.peer.label}: tokens differ from those without")
        count = rounds(list(contenders.values()), inputs, n_new, setting)
    finally:
        both.ours._fastskip.steps.overlap = Overlap.START
    found: dict[str, dict[str, Any]] = {}
    for (name, way_name), own in contenders.items():
        if own.failure is not None:
            faults.append(own.failure)
            continue
        seconds, plain = own.median("tpot"), contenders[name, WAYS[Overlap.NONE]].median("tpot")
        if seconds is None or plain is None:
            continue  # nothing to hold it to
        found.setdefault(name, {})[way_name] = {"tpot_ms": 1e3 * seconds, "gain": plain / seconds}
    about = {"widths": widths.name, "batch": batch, "n_new": n_new, "rounds": count}
    return {**about, "policies": found, "faults": faults}


def _policies(both: Models, names: Sequence[str]) -> Iterator[tuple[str, SkipPolicy]]:
    known = policies(both.depth)
    for name in names:
        yield name, policy_of(router(0.5, "omit")) if name == ROUTED else known[name]


def _contender(both: Models, name: str, policy: SkipPolicy, way: Overlap) -> Contender:
    def select() -> Any:
        both.ours._fastskip.steps.overlap = way
        return fastskip.set_policy(both.ours, policy)

    peer = Peer(WAYS[way], f"{name}, {WAYS[way]}", lambda depth: policy)
    return Contender(peer, fastskip.plan_of(select()), select)


CELLS = [
    Cell(
        f"overlap.7b.b{batch}",
        f"7B steps of overlapping launches against ordinary ones, batch {batch}",
        3,
        partial(measure, widths=SEVEN, batch=batch, names=names),
    )
    for batch, names in ((1, ("dense", "half_blocks", ROUTED)), (16, ("dense", "half_blocks")))
]
