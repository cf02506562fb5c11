"""Ways to run a decode step, compared: are they faster, and are they correct?

Overlapping launches (``ops.overlap``) must yield the tokens of ordinary ones. Where updates compute
half of the next norm (``contracts.HalfNorm``) rounding happens elsewhere, so tokens of random
weights differ: such steps must be as accurate as any, on a small model.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastskip
from benchmarks.gate import faults as wrong
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.end_to_end import N_NEW, Contender, first_call, rounds
from benchmarks.gpu.inputs import SEVEN, TINY, Widths
from benchmarks.gpu.models import load, policies, shape, tiny_model
from benchmarks.gpu.results import Values
from benchmarks.gpu.routed_policies import policy_of, router
from benchmarks.peers import Peer
from benchmarks.shapes import Models, models, prompts
from fastskip import SkipPolicy
from fastskip.generation.device_step import DeviceSteps
from fastskip.ops.overlap import Overlap

ROUTED = "routed, 50%"


@dataclass(frozen=True)
class Way:
    """How steps run; ``overlap`` and ``halves`` are those of ``DeviceSteps``."""

    name: str
    overlap: Overlap = Overlap.START
    halves: bool = False

    def take(self, steps: DeviceSteps) -> None:
        steps.overlap, steps.halves = self.overlap, self.halves


OVERLAPS = (
    Way("ordinary", Overlap.NONE),
    Way("overlapping"),
    Way("overlapping, reading ahead", Overlap.READ),
)
NORMS = (Way("norms in products"), Way("norms half in updates", halves=True))

Contenders = dict[tuple[str, Way], Contender]
"""By policy and way."""


def measure(
    setting: Setting, widths: Widths, batch: int, names: Sequence[str], ways: Sequence[Way]
) -> Values:
    """Milliseconds per token of each policy in each way, and the gain over the first way.

    What fails or is wrong is not timed, but listed among the faults.
    """
    found = list(_faults(setting, names, ways))
    if found:
        return {"policies": {}, "faults": found}
    widths, n_new = (TINY, 3) if setting.is_tiny else (widths, N_NEW)
    device = setting.device.type
    both = load(widths, setting.dtype, device, setting.impl)
    batch = min(batch, 2) if setting.is_tiny else batch
    inputs = prompts(both.hf, shape(widths, device), batch)
    steps = both.ours._fastskip.steps
    usual = Way("usual", steps.overlap, steps.halves)
    try:
        contenders, found = _agreeing(both, names, ways, inputs, n_new, setting)
        if not contenders:
            raise RuntimeError("\n".join(found))
        count = rounds(list(contenders.values()), inputs, n_new, setting)
    finally:
        usual.take(steps)
    found += [own.failure for own in contenders.values() if own.failure is not None]
    about = {"widths": widths.name, "batch": batch, "n_new": n_new, "rounds": count}
    return {**about, "policies": _times(contenders, ways[0]), "faults": found}


def _agreeing(
    both: Models,
    names: Sequence[str],
    ways: Sequence[Way],
    inputs: dict[str, Tensor],
    n_new: int,
    setting: Setting,
) -> tuple[Contenders, list[str]]:
    """What to time after a first call of each, and what is wrong with the others."""
    contenders: Contenders = {}
    found = []
    for name, policy in _policies(both, names):
        for way in ways:
            own = _contender(both, name, policy, way)
            try:
                first_call(own, inputs, n_new, setting.device.type)
            except Exception:
                if is_lost(setting.device):
                    raise
                found.append(f"{own.peer.label}: {traceback.format_exc(limit=-6)}")
                continue
            first = contenders.get((name, ways[0]), own)
            assert first.tokens is not None and own.tokens is not None
            if way.halves != ways[0].halves or torch.equal(first.tokens, own.tokens):
                contenders[name, way] = own
            else:
                found.append(f"{own.peer.label}: tokens differ from those of the first way")
    return contenders, found


def _times(contenders: Contenders, first: Way) -> dict[str, dict[str, Any]]:
    """Milliseconds per token by policy and way, and the gain over the ``first`` way."""
    times: dict[str, dict[str, Any]] = {}
    for (name, way), own in contenders.items():
        ordinary = contenders.get((name, first))
        if own.failure is not None or ordinary is None:
            continue
        seconds, plain = own.median("tpot"), ordinary.median("tpot")
        if seconds is not None and plain is not None:
            gain = plain / seconds
            times.setdefault(name, {})[way.name] = {"tpot_ms": 1e3 * seconds, "gain": gain}
    return times


def _faults(setting: Setting, names: Sequence[str], ways: Sequence[Way]) -> Iterator[str]:
    """What is wrong with steps that use half norms, on a small model."""
    device = setting.device.type
    for way in ways:
        if not way.halves:
            continue
        build = partial(tiny_model, device=device)
        both = models(build, setting.dtype, device, setting.impl)
        way.take(both.ours._fastskip.steps)
        for name, fault in wrong(both, dict(_policies(both, names))).items():
            yield f"{name}, {way.name}: {fault}"


def _policies(both: Models, names: Sequence[str]) -> Iterator[tuple[str, SkipPolicy]]:
    known = policies(both.depth)
    for name in names:
        yield name, policy_of(router(0.5, "omit")) if name == ROUTED else known[name]


def _contender(both: Models, name: str, policy: SkipPolicy, way: Way) -> Contender:
    def select() -> Any:
        way.take(both.ours._fastskip.steps)
        return fastskip.set_policy(both.ours, policy)

    peer = Peer(way.name, f"{name}, {way.name}", lambda depth: policy)
    return Contender(peer, fastskip.plan_of(select()), select)


def _cell(kind: str, about: str, ways: Sequence[Way], batch: int, names: Sequence[str]) -> Cell:
    run = partial(measure, widths=SEVEN, batch=batch, names=names, ways=ways)
    return Cell(f"{kind}.7b.b{batch}", f"7B steps {about}, batch {batch}", 3, run)


OVERLAPPING = "with overlapping launches against ordinary ones"
HALVED = "with norms half in updates against norms in products"
CELLS = [
    _cell("overlap", OVERLAPPING, OVERLAPS, 1, ("dense", "half_blocks", ROUTED)),
    _cell("overlap", OVERLAPPING, OVERLAPS, 16, ("dense", "half_blocks")),
    _cell("halves", HALVED, NORMS, 1, ("dense", "half_blocks")),
    _cell("halves", HALVED, NORMS, 16, ("dense", "half_blocks")),
]
