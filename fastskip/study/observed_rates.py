"""Observed skip rates of routers in one call of `generate`, on which its cost estimates rest."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from fastskip.plan import SkipPlan
from fastskip.routing import RoutingRecord

Rates = Mapping[int, float]
"""By router number: the share of its candidates that skipped."""


def observed_rates(plan: SkipPlan, record: RoutingRecord, new_tokens: int) -> tuple[Rates, Rates]:
    """Prefill and decode rates of the last call in a record, which generated `new_tokens`."""
    prompt, *steps = record.forwards[-new_tokens:]
    return _rates(plan, RoutingRecord([prompt])), _rates(plan, RoutingRecord(steps))


def _rates(plan: SkipPlan, record: RoutingRecord) -> dict[int, float]:
    """Per router, the unweighted mean over its cells."""
    seen = record.rates()
    found = {}
    for number in range(len(plan.policy.routers)):
        keys = {(r.layer, sub) for r in plan.routed if r.number == number for sub in r.skip}
        shares = [seen[key] for key in keys if key in seen]
        # A router without candidates in this phase does not affect its cost.
        found[number] = mean(shares) if shares else 0.0
    return found
