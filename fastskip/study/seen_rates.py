"""How many of their candidates routers let skip in one call of `generate`: what its costs go by."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from fastskip.plan import SkipPlan
from fastskip.routing import RoutingRecord

Rates = Mapping[int, float]
"""By the router's number: the share of its candidates that skipped."""


def seen_rates(plan: SkipPlan, record: RoutingRecord, new_tokens: int) -> tuple[Rates, Rates]:
    """In the prompt and in the steps of the last call in a record, which gave so many tokens."""
    prompt, *steps = record.forwards[-new_tokens:]
    return _rates(plan, RoutingRecord([prompt])), _rates(plan, RoutingRecord(steps))


def _rates(plan: SkipPlan, record: RoutingRecord) -> dict[int, float]:
    """Of each router, its cells weighing alike."""
    seen = record.rates()
    found = {}
    for number in range(len(plan.policy.routers)):
        keys = {(r.layer, sub) for r in plan.routed if r.number == number for sub in r.skip}
        shares = [seen[key] for key in keys if key in seen]
        # Without candidates in this phase it does not matter.
        found[number] = mean(shares) if shares else 0.0
    return found
