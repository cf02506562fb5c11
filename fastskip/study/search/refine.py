"""Improves solutions by measuring whole policies, since the losses of changes do not simply add up.

Large neighbourhood search (Shaw, "Using constraint programming and local search methods to solve
vehicle routing problems", 1998): a few layers of a good solution are freed, the losses of their
offers are perturbed, and the solver fills them again under the same budget; the resulting policy is
measured. Offers new to a solution that turns out worse than its parent get a higher price from then
on, those of better ones a lower price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastskip.policy import SkipPolicy
from fastskip.study.search.changes import policy_of
from fastskip.study.search.solver import Offer, Solution, solve

_SHAKEN = 0.7
"""Standard deviation of the logarithm of the factor that perturbs losses."""
_ELITE = 4
"""Parents are drawn from this many best solutions."""
_TRIES = 8
"""After this many failures in a row one more layer is freed; after four times as many, it ends."""
_TIGHTENED = 6
"""How often the solver is run for one solution, under tighter and tighter limits."""


@dataclass(frozen=True, slots=True)
class Refined:
    """The best solution found; `first`: the solver's; `tried`: how many were measured."""

    solution: Solution
    kl: float
    first: Solution
    first_kl: float
    tried: int
    is_cut_short: bool = False

    @property
    def policy(self) -> SkipPolicy:
        """The best solution as a policy."""
        return policy_for(self.solution)


@dataclass(frozen=True)
class Refinery:
    """Finds solutions and measures them.

    Attributes:
        depth: layers.
        divergence: how far a policy moves the answers (nats).
        share: the share of dense that a whole policy costs.
        is_over: whether time is up.
        on_try: called after each solution measured.
    """

    depth: int
    divergence: Callable[[SkipPolicy], float]
    share: Callable[[SkipPolicy], float]
    is_over: Callable[[], bool] = lambda: False
    on_try: Callable[[], object] = lambda: None

    def within(self, offers: Sequence[Offer], limit: float) -> Solution | None:
        """The solver's solution whose policy as a whole keeps to `limit`; `None` if none does.

        In the whole policy, entries to reuse may be missing, so that savings do not quite add up:
        the solver is then told to save more.
        """
        least = 1 - limit
        for _ in range(_TIGHTENED):
            found = solve(offers, self.depth, least)
            if found is None:
                return None
            missing = self.share(policy_for(found)) - limit
            if missing <= SLACK:
                return found
            least += missing
        return None

    def refine(
        self, offers: Sequence[Offer], limit: float, tries: int, seed: int
    ) -> Refined | None:
        """The best of up to `tries` measured solutions within `limit`; `None` if there is none.

        The same seed gives the same result, unless time runs out.
        """
        rng = np.random.default_rng(seed)
        first = self.within(offers, limit)
        if first is None:
            return None
        weights = dict.fromkeys(offers, 1.0)
        known = {first: self.divergence(policy_for(first))}
        self.on_try()
        failures, is_over = 0, False
        while len(known) < tries and failures < _TRIES * 4:
            is_over = self.is_over()
            if is_over:
                break
            elite = sorted(known, key=known.__getitem__)[:_ELITE]
            parent = elite[min(int(rng.exponential(1.0)), len(elite) - 1)]
            child = self._child(offers, weights, parent, limit, rng, failures)
            if child is None or child in known:
                failures += 1
                continue
            failures = 0
            known[child] = self.divergence(policy_for(child))
            self.on_try()
            ratio = (known[child] + 1e-6) / (known[parent] + 1e-6)
            for offer in set(child) - set(parent):
                weights[offer] *= float(np.clip(ratio, 0.5, 2.0)) ** 0.5
        best = min(known, key=known.__getitem__)
        return Refined(best, known[best], first, known[first], len(known), is_over)

    def _child(
        self,
        offers: Sequence[Offer],
        weights: dict[Offer, float],
        parent: Solution,
        limit: float,
        rng: np.random.Generator,
        failures: int,
    ) -> Solution | None:
        most = max(2, self.depth // 2)
        size = min(self.depth, int(rng.integers(2, most + 1)) + failures // _TRIES)
        free = {int(n) for n in rng.choice(self.depth, size=size, replace=False)}
        for own in parent:  # both layers of a pair, or none
            if free & set(own.layers):
                free |= set(own.layers)
        noise = np.exp(_SHAKEN * rng.standard_normal(len(offers)))
        kept = [own for own in parent if not free & set(own.layers)]
        open_ = [
            (offer, replace(offer, kl=offer.kl * weights[offer] * float(shaken)))
            for offer, shaken in zip(offers, noise, strict=True)
            if set(offer.layers) <= free
        ]
        shaken_to = {shaken: offer for offer, shaken in open_}
        found = self.within([*kept, *shaken_to], limit)
        return None if found is None else tuple(shaken_to.get(offer, offer) for offer in found)


SLACK = 1e-6
"""By how much a share of dense may exceed its limit: the solver's own tolerance."""


def policy_for(solution: Solution, name: str = "") -> SkipPolicy:
    """The policy of a solution."""
    return policy_of(((offer.layer, offer.choice) for offer in solution), name)
