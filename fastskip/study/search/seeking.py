"""From sensitivities to policies: at the budget, and at milder ones between dense and it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastskip.plan import ModelShape
from fastskip.study.search import solver
from fastskip.study.search.bench import Bench
from fastskip.study.search.budget import Budget, impossible
from fastskip.study.search.changes import BLOCK, changes_of, choices_of
from fastskip.study.search.conclusion import FOUND
from fastskip.study.search.latency import Timed
from fastskip.study.search.pricing import Pricing
from fastskip.study.search.refine import SLACK, Refined, Refinery
from fastskip.study.search.sensitivity import Sensitivities
from fastskip.study.search.settings import SearchSettings, Watcher
from fastskip.study.search.solver import Offer

_CORRECTIONS = 3
"""How often the search is repeated for a policy that misses a time budget when measured."""
_FIRST, _MILDER, _CHEAPER = 0.6, 0.3, 0.1
"""Shares of the time: at the budget, at milder ones, at the cheapest rival's cost."""


@dataclass(frozen=True)
class Sought:
    """The refined solutions by name, and the prices and the limit used to find them.

    `cheaper`: the name of the solution that costs no more than the cheapest rival, if any.
    """

    pricing: Pricing
    limit: float
    refined: Mapping[str, Refined]
    cheaper: str | None = None


@dataclass(frozen=True)
class Seeker:
    """Searches for policies of the model on the bench."""

    bench: Bench
    budget: Budget
    settings: SearchSettings
    watcher: Watcher

    def seek(self, sensitivities: Sensitivities) -> Sought:
        """The best at the budget and at milder ones.

        A policy that misses a time budget when measured becomes a further probe for the latency
        fit, and the search is repeated with the new fit.
        """
        tries = self.settings.tries
        probes: list[list[Timed]] = []
        for number in range(_CORRECTIONS + 1):
            pricing = self.bench.pricing(self.budget.quantity, probes)
            limit = self.budget.limit(pricing.dense_s)
            turns = 1 if pricing.latency is None else _CORRECTIONS + 1
            found = self._refined(sensitivities, pricing, {FOUND: limit}, tries, _FIRST / turns)
            phase = self.budget.quantity.phase
            if phase is None or FOUND not in found or number == _CORRECTIONS:
                break
            timed = self.bench.timed(f"find {number}", [found[FOUND].policy])
            dense, own = timed
            if own.share(dense, phase) <= limit:
                break
            probes.append(timed)
        limits = milder(limit, self.settings.points)
        more = self._refined(sensitivities, pricing, limits, max(1, tries // 2), _MILDER)
        return Sought(pricing, limit, {**found, **more})

    def cheaper(self, sensitivities: Sensitivities, sought: Sought, limit: float) -> Sought:
        """Adds the best at a harsher limit, the cost of the cheapest rival: rivals' costs come in
        steps and may be below the budget."""
        tries = max(1, self.settings.tries // 2)
        more = self._refined(sensitivities, sought.pricing, {_at(limit): limit}, tries, _CHEAPER)
        found = next(iter(more), None)
        return replace(sought, refined={**sought.refined, **more}, cheaper=found)

    def _refined(
        self,
        sensitivities: Sensitivities,
        pricing: Pricing,
        limits: Mapping[str, float],
        tries: int,
        share: float,
    ) -> dict[str, Refined]:
        offers = solver.worthwhile(
            offers_of(self.bench.shape, pricing, sensitivities), self.bench.shape.depth
        )
        minutes, began = self.settings.minutes, time.monotonic()
        seconds = None if minutes is None else 60 * minutes * share
        found = {}
        for place, (name, limit) in enumerate(limits.items()):
            self.watcher.on_stage(f"refining: {name}", tries)
            allowed = None if seconds is None else seconds * (place + 1) / len(limits)

            def is_over(allowed: float | None = allowed) -> bool:
                return allowed is not None and time.monotonic() - began > allowed

            refinery = Refinery(
                self.bench.shape.depth,
                self.bench.divergence,
                pricing.share,
                is_over,
                self.watcher.on_step,
            )
            best = refinery.refine(offers, limit, tries, self.settings.seed + place)
            if best is not None:
                found[name] = best
        return found


def milder(limit: float, points: int) -> dict[str, float]:
    """That many limits between a limit and dense, by names with enough digits to differ."""
    shares = [limit + (1 - limit) * n / (points + 1) for n in range(1, points + 1)]
    named = ({_at(share, digits): share for share in shares} for digits in range(3, 18))
    return next(each for each in named if len(each) == len(set(shares)))


def _at(share: float, digits: int = 3) -> str:
    return f"{FOUND} at {share:.{digits}g}"


def offers_of(shape: ModelShape, pricing: Pricing, sensitivities: Sensitivities) -> list[Offer]:
    """Every choice of every layer, with its loss and its savings."""
    return [
        Offer(layer, choice, sensitivities.kl(layer, choice), pricing.saved(layer, choice))
        for layer in range(shape.depth)
        for choice in choices_of(sensitivities.changes(layer), shape.classes)
    ]


def check_possible(shape: ModelShape, pricing: Pricing, budget: Budget) -> None:
    """Raise `BudgetError` early, if even skipping everything does not meet the budget."""
    every = frozenset(shape.classes)
    harshest = [
        (layer, change)
        for layer in range(shape.depth)
        for change in changes_of(layer, shape.depth, shape.classes)
        if change.tokens == every and change.skip in (BLOCK, frozenset())
    ]
    offers = [
        Offer(layer, (change,), 0.0, pricing.saved(layer, (change,))) for layer, change in harshest
    ]
    least = 1 - solver.most_saved(offers, shape.depth)
    if least > budget.limit(pricing.dense_s) + SLACK:
        raise impossible(budget, max(least, 1e-9), pricing.dense_s)
