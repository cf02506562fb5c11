"""Solutions bettered by measuring whole policies, since changes do not simply add up.

A search in large neighbourhoods (Shaw, "Using constraint programming and local search methods to
solve vehicle routing problems", 1998): of a good solution a few layers are set free, their losses
are shaken, and the solver fills them anew under the same budget; what comes out is measured. Offers
that turn out worse than the solution they came into are dearer from then on, better ones cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastskip.policy import SkipPolicy
from fastskip.study.search.changes import policy_of
from fastskip.study.search.solver import Offer, Solution, solve

_SHAKEN = 0.7
"""Standard deviation of the logarithm of what losses are multiplied by."""
_ELITE = 4
_TRIES = 8
"""How often in a row a solution that is known already may come out."""
_TIGHTENED = 6


@dataclass(frozen=True, slots=True)
class Refined:
    """The best solution found; `first`: the solver's own; `tried`: solutions measured."""

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
    """How solutions are measured.

    Attributes:
        depth: layers.
        divergence: how far a policy moves the answers (nats).
        share: what a whole policy takes, as a share of dense.
        is_over: whether time is up.
        on_try: called after each solution measured.
    """

    depth: int
    divergence: Callable[[SkipPolicy], float]
    share: Callable[[SkipPolicy], float]
    is_over: Callable[[], bool] = lambda: False
    on_try: Callable[[], object] = lambda: None

    def within(self, offers: Sequence[Offer], limit: float) -> Solution | None:
        """The solver's solution whose policy as a whole keeps `limit`; `None` if none does.

        Entries that are reused may be wanting in the whole policy, so that what is saved does not
        quite add up: then more is asked for.
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
        """The best solution that keeps `limit`, of `tries` measured ones; `None` if none keeps it.

        The same seed gives the same result, unless time is up.
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
"""By how much of dense a share may miss its limit: the solver's own tolerance."""


def policy_for(solution: Solution, name: str = "") -> SkipPolicy:
    """The policy of a solution."""
    return policy_of(((offer.layer, offer.choice) for offer in solution), name)
