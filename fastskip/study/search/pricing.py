"""The cost of policies in a budget's quantity, as a share of the dense model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy
from fastskip.study.search.budget import Quantity
from fastskip.study.search.changes import Choice
from fastskip.study.search.costing import Costing, Numbers, flops_of
from fastskip.study.search.latency import Latency


@dataclass(frozen=True)
class Pricing:
    """Prices in one budget's quantity; `latency` is needed if that is a time."""

    costing: Costing
    quantity: Quantity
    latency: Latency | None = None

    @property
    def dense_s(self) -> float | None:
        """The dense model's measured time; `None` for FLOPs."""
        phase = self.quantity.phase
        return None if phase is None or self.latency is None else self.latency.dense_s[phase]

    def saved(self, layer: int, choice: Choice) -> float:
        """The share of dense that a choice in one layer saves; adds up over layers."""
        return self._share(self.costing.saved(layer, choice))

    def share(self, policy: SkipPolicy, rates: Mapping[int, float] | None = None) -> float:
        """The share of dense that a whole policy costs; `rates`: of skipping, by router number."""
        return 1 - self._share(self.costing.dense - self._numbers(policy, rates))

    def flops(self, policy: SkipPolicy, rates: Mapping[int, float] | None = None) -> float:
        """The share of the dense FLOPs that a whole policy needs."""
        return flops_of(self._numbers(policy, rates)) / flops_of(self.costing.dense)

    def _numbers(self, policy: SkipPolicy, rates: Mapping[int, float] | None) -> Numbers:
        plan: Any = make_plan(policy, self.costing.shape)
        if policy.routers:
            plan = plan.expected(rates)
        return self.costing.numbers(plan)

    def _share(self, saved: Numbers) -> float:
        phase = self.quantity.phase
        if phase is None:
            return flops_of(saved) / flops_of(self.costing.dense)
        assert self.latency is not None
        return self.latency.saved(saved, phase) / self.latency.dense_s[phase]
