"""Picks from a family of policies the member that makes the most of a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastskip.plan import ModelShape, make_plan
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.study.search.refine import SLACK

NEAR = 0.03
"""Members within this share of dense of the nearest one count as equally near."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy to judge; rivals have the `source` "uniform", "random", "peer" or "router"."""

    name: str
    source: str
    policy: SkipPolicy
    rates: tuple[float, ...] = ()
    """The shares that its routers skip, by router number."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A rival that cannot be compared at the budget, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Match:
    """How families are matched to a budget: a policy's `share` of the dense cost, the `limit` on
    it, and the `divergence` (nats) that decides between members of similar cost."""

    shape: ModelShape
    share: Callable[[SkipPolicy], float]
    limit: float
    divergence: Callable[[SkipPolicy], float]

    def fits(self, policy: SkipPolicy) -> bool:
        """Whether a policy meets the budget."""
        return self.share(policy) <= self.limit + SLACK

    def nearest(self, name: str, source: str, family: Iterable[SkipPolicy]) -> Entrant | LeftOut:
        """The member nearest to the budget from below; of several, the one that moves answers
        least. Members that the model cannot run, or that skip nothing, are ignored."""
        shares = {}
        least = 1.0
        for policy in family:
            try:
                plan = make_plan(policy, self.shape)
            except PolicyError:
                continue
            if plan.is_dense:
                continue
            share = self.share(policy)
            least = min(least, share)
            if share <= self.limit + SLACK:
                shares[policy] = share
        if not shares:
            return over_budget(name, least, self.limit)
        highest = max(shares.values())
        near = [policy for policy, share in shares.items() if share >= highest - NEAR]
        best = near[0] if len(near) == 1 else min(near, key=self.divergence)
        return Entrant(name, source, best)


def least_first(worth: Mapping[int, float]) -> list[int]:
    """Layers by what they are worth; of equals, the lower first."""
    return sorted(worth, key=lambda layer: (worth[layer], layer))


def over_budget(name: str, least: float, limit: float) -> LeftOut:
    """A rival whose cheapest form, `least` of dense, exceeds the limit."""
    return LeftOut(name, f"costs at least {least:.3g} of dense; the budget allows {limit:.3g}")


def parted(found: Sequence[Entrant | LeftOut]) -> tuple[list[Entrant], list[LeftOut]]:
    """Splits into entrants and rivals left out."""
    entered = [each for each in found if isinstance(each, Entrant)]
    return entered, [each for each in found if isinstance(each, LeftOut)]
