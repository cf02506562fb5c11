"""Candidates on items that the search did not see: scores, times, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastskip.policy import SkipPolicy
from fastskip.study.evaluation.judging import Judgement
from fastskip.study.search.bench import Bench
from fastskip.study.search.budget import Budget, Quantity
from fastskip.study.search.conclusion import FOUND
from fastskip.study.search.matching import Entrant
from fastskip.study.search.refine import SLACK, policy_for
from fastskip.study.search.result import Comparison, Found, front
from fastskip.study.search.seeking import Sought

_SAME = 0.005
"""Costs that differ by no more than this share of dense count as equal."""
DENSE = Entrant("dense", "dense", SkipPolicy())


def entrants_of(sought: Sought) -> list[Entrant]:
    """What the search found, and what its solver alone would have picked at the budget."""
    found = [
        Entrant(name, "search", replace(each.policy, name=name))
        for name, each in sought.refined.items()
    ]
    own = sought.refined.get(FOUND)
    if own is not None and own.first != own.solution:
        name = f"{FOUND}, solver alone"
        found.append(Entrant(name, "search", policy_for(own.first, name)))
    return found


def cheapest(sought: Sought, entrants: Sequence[Entrant]) -> float | None:
    """The cost of the cheapest uniform interval or peer, as a share of dense; `None` if there is
    none, or if it costs about as much as the budget allows."""
    rivals = [each.policy for each in entrants if each.source in ("uniform", "peer")]
    least = min(map(sought.pricing.share, rivals), default=sought.limit)
    return None if least > sought.limit - _SAME else least


def candidates_of(
    bench: Bench,
    budget: Budget,
    sought: Sought,
    entrants: Sequence[Entrant],
    judged: Sequence[Judgement],
) -> list[Found]:
    """Dense and the entrants with all their numbers; `judged`: of each, in the same order."""
    dense, found = judged[0], []
    for entrant, own in zip([DENSE, *entrants], judged, strict=True):
        rates = dict(enumerate(entrant.rates)) or None
        cost = sought.pricing.share(entrant.policy, rates)
        tokens, kl = own.agreement.means
        found.append(
            Found(
                name=entrant.name,
                source=entrant.source,
                policy=entrant.policy,
                cost=cost,
                flops=sought.pricing.flops(entrant.policy, rates),
                ttft_s=None if own.speed is None else own.speed.ttft_s,
                tpot_s=None if own.speed is None else own.speed.tpot_s,
                calibration_kl=bench.divergence(entrant.policy),
                score=own.evaluation.estimate(),
                change=own.change(dense),
                tokens=tokens,
                kl=kl,
                keeps_budget=_keeps(budget, own, dense, cost, sought.limit),
            )
        )
    return _with_front(found, budget.quantity)


def comparisons_of(
    candidates: Sequence[Found], judged: Sequence[Judgement], own: str | None = FOUND
) -> tuple[Comparison, ...]:
    """The search's policy named `own` against all rivals at the budget; empty without it."""
    by_name = {each.label: each.evaluation for each in judged}
    if own is None or own not in by_name:
        return ()
    return tuple(
        Comparison(each.name, each.source, by_name[own].minus(by_name[each.name]))
        for each in candidates
        if each.source not in ("dense", "search")
    )


def _keeps(budget: Budget, own: Judgement, dense: Judgement, cost: float, limit: float) -> bool:
    name = budget.quantity.seconds
    if name is None or own.speed is None or dense.speed is None:
        return cost <= limit + SLACK
    taken, base = getattr(own.speed, name), getattr(dense.speed, name)
    return bool(taken <= (limit * base if budget.most_s is None else budget.most_s))


def _with_front(found: Sequence[Found], quantity: Quantity) -> list[Found]:
    """Marks the Pareto front in cost and score; times count as measured."""

    def cost(each: Found) -> float:
        taken = None if quantity.seconds is None else getattr(each, quantity.seconds)
        return each.cost if taken is None else float(taken)

    marks = front([(cost(each), each.score.mean) for each in found])
    return [replace(each, is_on_front=mark) for each, mark in zip(found, marks, strict=True)]
