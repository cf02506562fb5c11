"""Skips that routers decide on the device: whole models against static plans that skip as much.

Decisions are drawn at random at a given rate: a draw takes no product and needs no learned weights.
A linear router, which reads one more vector per layer, and a similarity router, which looks at what
the last layer changed, are timed as far as they need no calibration.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

import fastskip
from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.end_to_end import Contender, first_call, floors_of, rounds
from benchmarks.gpu.inputs import SEVEN, TINY, Widths, text_before
from benchmarks.gpu.models import load, shape
from benchmarks.gpu.results import Values
from benchmarks.gpu.routed_blocks import blocks
from benchmarks.gpu.routed_decisions import decisions
from benchmarks.gpu.routed_policies import GROUPS, KIND_OF, linear, policy_of, router, static
from benchmarks.peers import Peer
from benchmarks.shapes import Models, prompts, ragged
from fastskip.generation.guarding import Guarding
from fastskip.plan.costs import Ceilings
from fastskip.policy import SkipPolicy, Sublayer
from fastskip.routing import RoutingRecord

RATES = (0.25, 0.5, 0.75)
N_NEW = 128
OTHER = (("if", Guarding.CONDITIONAL), ("loop", Guarding.HOPS))
"""Alternatives to early exits for skipping blocks, with the prefixes of their names."""


@dataclass(frozen=True)
class Way:
    """One policy, and how its steps skip blocks; ``rate``, 0 to 1, is the requested one."""

    name: str
    label: str
    policy: SkipPolicy
    rate: float
    is_routed: bool = True
    guarding: Guarding = Guarding.EARLY_EXIT


@dataclass
class Seen:
    """What happened under a way: the shares of candidates that skipped in the prompt and in the
    steps, and of the steps' blocks that no row ran."""

    contender: Contender
    prompt: float = 0.0
    steps: float = 0.0
    idle: float = 0.0


def measure(setting: Setting, widths: Widths, batch: int, kv: str) -> Values:
    """Times dense, static and routed plans in turn; one that fails is dropped."""
    ceilings = ceilings_of(setting)
    widths, n_new = (TINY, 4) if setting.is_tiny else (widths, N_NEW)
    device = setting.device.type
    both = load(widths, setting.dtype, device, setting.impl)
    batch = min(batch, 2) if setting.is_tiny else batch
    inputs = ragged(prompts(both.hf, shape(widths, device), batch))
    failures: dict[str, str] = {}
    ways = list(_ways(both, batch, kv, setting))
    seen: dict[str, Seen] = {}
    for way in ways:
        try:
            seen[way.name] = _first(way, both, inputs, n_new, device)
        except Exception:
            if is_lost(setting.device):
                raise
            failures[way.name] = traceback.format_exc(limit=-6)
    if not seen:
        raise RuntimeError("\n".join(failures.values()))
    contenders = [each.contender for each in seen.values()]
    try:
        count = rounds(contenders, inputs, n_new, setting)
    finally:
        both.ours._fastskip.steps.guarding = Guarding.EARLY_EXIT
    for name, each in list(seen.items()):
        if each.contender.failure is not None:
            failures[name] = each.contender.failure
            del seen[name]
    about = {"widths": widths.name, "batch": batch, "n_new": n_new, "kv": kv, "rounds": count}
    about |= {"n_image": widths.n_image, "n_text": widths.n_text}
    found = _summary([way for way in ways if way.name in seen], seen, about, ceilings)
    return {**about, "ways": found, "failures": failures}


def _ways(both: Models, batch: int, kv: str, setting: Setting) -> Iterator[Way]:
    depth = both.depth
    yield Way("dense", "dense", policy_of(), 0.0, is_routed=False)
    rates = (0.5,) if setting.is_tiny else RATES
    for rate in rates:
        label = f"static, {rate:.0%} of the blocks"
        yield Way(f"static_{rate}", label, static(rate, kv, depth), rate, is_routed=False)
    for group in GROUPS if batch > 1 else GROUPS[:1]:
        for rate in rates if setting.is_tiny else (0.0, *rates):
            policy = policy_of(router(rate, kv, group))
            by = f" by {group}" if batch > 1 else ""
            yield Way(f"{group}_{rate}", f"routed{by}, {rate:.0%}", policy, rate)
    # Nodes have the most to gain where one decision covers the whole step.
    group = "row" if batch == 1 else "batch"
    for short, guarding in OTHER if kv == "omit" else OTHER[:1]:
        for rate in rates if setting.is_tiny else (0.0, *rates):
            label = f"routed, {KIND_OF[guarding]}, {rate:.0%}"
            policy = policy_of(router(rate, kv, group))
            yield Way(f"{short}_{rate}", label, policy, rate, guarding=guarding)
    if batch == 1 and kv == "omit":
        width = both.hf.config.text_config.hidden_size
        for threshold, label in ((-1e30, "0%"), (0.0, "some")):
            own = linear(threshold, depth, width, setting.folder)
            yield Way(f"linear_{label}", f"routed, linear, {label}", policy_of(own), 0.0)
        # At this threshold no row skips that a layer has changed.
        own = {"layers": ":", "tokens": "all", "skip": ["block"], "kind": "similarity"}
        own |= {"measure": "change", "threshold": 0.0, "kv": kv}
        yield Way("similarity_0%", "routed, similarity, 0%", policy_of(own), 0.0)


def _first(way: Way, both: Models, inputs: dict[str, Tensor], n_new: int, device: str) -> Seen:
    """Compiles, captures, and reads back the decisions; draws are the same in every call."""
    plan = fastskip.plan_of(fastskip.set_policy(both.ours, way.policy))

    def select() -> Any:
        both.ours._fastskip.steps.guarding = way.guarding
        return fastskip.set_policy(both.ours, way.policy)

    own = Contender(Peer(way.name, way.label, lambda depth: way.policy), plan, select)
    with fastskip.record_routing(both.ours) as record:
        first_call(own, inputs, n_new, device)
    if not record.forwards:
        return Seen(own)
    prompt, *steps = record.forwards[:n_new]
    idle = [
        bool(each.skipped[layer, Sublayer.ATTENTION].all())
        for each in steps
        for layer in range(both.depth)
    ]
    at_first, later = (RoutingRecord(part).rate for part in ([prompt], steps))
    return Seen(own, at_first, later, statistics.mean(idle))


def _summary(
    ways: Sequence[Way], seen: dict[str, Seen], about: dict[str, Any], ceilings: Ceilings
) -> dict[str, Any]:
    """Milliseconds, and percent over a static plan that skips as much.

    That means as many rows in a prompt, and as many whole blocks in decode steps, where one row is
    enough to stream all weights of a block.
    """
    found = {}
    for way in ways:
        did = seen[way.name]
        own: dict[str, Any] = {"label": way.label, "is_routed": way.is_routed, "rate": way.rate}
        own |= {"guarding": way.guarding.value, "rate_prompt": did.prompt}
        own |= {"rate_steps": did.steps, "idle_steps": did.idle}
        floors = _floors(did, about, ceilings)
        for quantity, skipped in (
            ("ttft", did.prompt),
            ("prefill", did.prompt),
            ("tpot", did.idle),
        ):
            seconds = _seconds(did, quantity)
            own[f"{quantity}_ms"] = None if seconds is None else 1e3 * seconds
            dense = _seconds(seen["dense"], quantity) if "dense" in seen else None
            if seconds is None or dense is None:
                continue
            own[f"{quantity}_vs_dense"] = dense / seconds
            own[f"{quantity}_over_dense_percent"] = 100 * (seconds / dense - 1)
            if quantity in floors:
                ideal = _floors(seen["dense"], about, ceilings)[quantity] / floors[quantity]
                own[f"{quantity}_share_of_ideal"] = dense / seconds / ideal
            points = _static_points(ways, seen, quantity)
            if way.is_routed and len(points) > 1:
                own[f"{quantity}_over_static_percent"] = 100 * (
                    seconds / between(points, skipped) - 1
                )
        found[way.name] = own
    return found


def _static_points(
    ways: Sequence[Way], seen: dict[str, Seen], quantity: str
) -> list[tuple[float, float]]:
    """By static plan: the share of blocks that it skips, and its seconds."""
    points = []
    for way in ways:
        contender, seconds = seen[way.name].contender, _seconds(seen[way.name], quantity)
        if not way.is_routed and seconds is not None:
            layers = contender.plan.layers
            skipped = sum(not layer.attending for layer in layers) / len(layers)
            points.append((skipped, seconds))
    return sorted(points)


def between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at ``x`` interpolated linearly through the points, extrapolated at the ends."""
    pairs = list(pairwise(points))
    inside = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
    (a, low), (b, high) = inside
    return low + (high - low) * (x - a) / (b - a)


def _seconds(seen: Seen, quantity: str) -> float | None:
    """Median seconds; for steps, which differ in what they skip, of the mean gap between tokens."""
    return seen.contender.median("tpot_mean" if quantity == "tpot" else quantity)


def _floors(seen: Seen, about: dict[str, Any], ceilings: Ceilings) -> dict[str, float]:
    """Floor seconds of the prefill and of a mean step, as expected at these rates."""
    plan, rows = seen.contender.plan, [(about["n_image"], about["n_text"])] * about["batch"]
    rates = (seen.prompt, seen.steps) if plan.routed else (None, None)
    return floors_of(plan, rows, about["n_new"], ceilings, text_before(about["n_text"]), rates)


def _model_cell(batch: int, kv: str) -> Cell:
    about = f"7B with routers at batch {batch}, KV rule {kv}, against static plans"
    minutes = 1.6 if batch == 1 else 4.0
    run = partial(measure, widths=SEVEN, batch=batch, kv=kv)
    return Cell(f"routing.7b.b{batch}.{kv}", about, minutes, run, batch == 1 and kv == "omit")


CELLS = [
    Cell("routing.decisions", "are routed runs correct? (small models)", 2.7, decisions, True),
    Cell(
        "routing.blocks",
        "cost of a guarded block that runs or is skipped",
        0.6,
        partial(blocks, widths=SEVEN),
        True,
    ),
    *(_model_cell(batch, kv) for batch in (1, 4, 16) for kv in ("omit", "project")),
]
