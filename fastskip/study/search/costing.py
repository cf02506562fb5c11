"""The cost of a plan, as numbers that add up over layers.

Counted from the plan's own operations: FLOPs and, for prefill and decode separately, the least time
of attention and FFN (a roofline floor: memory or arithmetic, whichever is slower, operation by
operation), how many of them run at all, and how many are arranged in parallel or in pairs. Layers'
numbers are independent of each other, except for reused entries and those of the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskip.plan import ModelShape, SkipPlan, make_plan
from fastskip.plan.costs import Ceilings, Cost, Operation, Planned
from fastskip.plan.single_call import SingleCall
from fastskip.policy import Arrangement, SkipPolicy
from fastskip.study.search.changes import Choice, policy_of, span_of

Numbers = NDArray[np.float64]

PHASES = ("prefill", "decode")
PARTS = ("attention", "ffn", "attentions", "ffns", "parallel", "pairs")
"""Of a phase: floors in seconds; how many sublayers run; how many layers or pairs are rewired."""


@dataclass(frozen=True)
class Costing:
    """The costs of one model's plans for one workload on one machine."""

    shape: ModelShape
    workload: SingleCall
    ceilings: Ceilings

    def numbers(self, plan: Planned) -> Numbers:
        """`[1 + 2 * 6]`: FLOPs, then `PARTS` of prefill and of one decode step."""
        cost = self.workload.cost(plan)
        phases = [self._phase(plan, cost.prefill), self._phase(plan, cost.decode)]
        return np.array([cost.flops, *(x for phase in phases for x in phase)], np.float64)

    def of(self, policy: SkipPolicy) -> Numbers:
        """The numbers of a policy without routers, or of one whose routers skip nothing."""
        return self.numbers(make_plan(policy, self.shape))

    @property
    def dense(self) -> Numbers:
        """The numbers of the dense model."""
        return _dense(self)

    def saved(self, layer: int, choice: Choice) -> Numbers:
        """What a choice in one layer saves, all other layers dense (so entries to reuse exist)."""
        return _saved(self, self._alike(layer, choice), choice)

    def _alike(self, layer: int, choice: Choice) -> int:
        """A layer with the same numbers: layers differ only at both ends of the stack."""
        depth = self.shape.depth
        return layer if layer == 0 or layer + span_of(choice) >= depth or depth < 4 else 1

    def _phase(self, plan: Planned, cost: Cost) -> list[float]:
        steps = max(cost.steps, 1)
        attention = [op for op in cost.ops if op.kind not in ("ffn", "lm_head")]
        ffn = [op for op in cost.ops if op.kind == "ffn"]
        running = {op.layer for op in attention if op.kind == "scores" and op.layer is not None}
        feeding = {op.layer for op in ffn if op.layer is not None}
        arranged = _arranged(plan)
        return [
            sum(map(self._floor, attention)) / steps,
            sum(map(self._floor, ffn)) / steps,
            len(running),
            len(feeding),
            len([n for n in running & feeding if arranged.get(n) is Arrangement.PARALLEL]),
            len([n for n in running & feeding if arranged.get(n) is Arrangement.PAIR]) / 2,
        ]

    def _floor(self, op: Operation) -> float:
        by_memory = op.bytes / self.ceilings.bandwidth_bytes_per_s
        return op.times * max(by_memory, op.flops / self.ceilings.flops_per_s)


def phase_of(numbers: Numbers, phase: str) -> Numbers:
    """The `PARTS` of one phase."""
    first = 1 + len(PARTS) * PHASES.index(phase)
    return numbers[first : first + len(PARTS)]


def flops_of(numbers: Numbers) -> float:
    """FLOPs."""
    return float(numbers[0])


@cache
def _dense(costing: Costing) -> Numbers:
    return costing.of(SkipPolicy())


@cache
def _saved(costing: Costing, layer: int, choice: Choice) -> Numbers:
    return costing.dense - costing.of(policy_of([(layer, choice)]))


def _arranged(plan: Any) -> Mapping[int, Arrangement]:
    if not isinstance(plan, SkipPlan):
        return {}
    return {layer.index: layer.arrangement for layer in plan.layers}
