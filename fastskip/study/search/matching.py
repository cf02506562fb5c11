"""Of a family of policies the member that costs as much as a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastskip.plan import ModelShape, make_plan
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.study.search.refine import SLACK

NEAR = 0.03
"""Members that cost less than the nearest one by no more than this share are as near."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy that the find is held to. `source`: "uniform", "random", "peer" or "router"."""

    name: str
    source: str
    policy: SkipPolicy
    rates: tuple[float, ...] = ()
    """Of routers, by number: the shares that skip."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What cannot be held to the budget, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Match:
    """How a family is matched to a budget: `share` of dense that a policy takes, `limit` for it,
    and `divergence`, by which members that cost alike are told apart (nats)."""

    shape: ModelShape
    share: Callable[[SkipPolicy], float]
    limit: float
    divergence: Callable[[SkipPolicy], float]

    def fits(self, policy: SkipPolicy) -> bool:
        """Whether a policy keeps the budget."""
        return self.share(policy) <= self.limit + SLACK

    def nearest(self, name: str, source: str, family: Iterable[SkipPolicy]) -> Entrant | LeftOut:
        """The member nearest to the budget from below; of several the one that moves answers
        least. Members that the model cannot run, and those that leave nothing out, are passed
        over."""
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
            return LeftOut(
                name, f"takes {least:.3g} of dense at the least, {self.limit:.3g} wanted"
            )
        highest = max(shares.values())
        near = [policy for policy, share in shares.items() if share >= highest - NEAR]
        best = near[0] if len(near) == 1 else min(near, key=self.divergence)
        return Entrant(name, source, best)


def parted(found: Sequence[Entrant | LeftOut]) -> tuple[list[Entrant], list[LeftOut]]:
    """Those that entered, and those that did not."""
    entered = [each for each in found if isinstance(each, Entrant)]
    return entered, [each for each in found if isinstance(each, LeftOut)]
