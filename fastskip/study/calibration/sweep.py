"""One pass over the samples under one policy: how many rows skipped, and what they scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastskip.loading import plan_of, record_routing, set_policy, watching_routers
from fastskip.policy import RouterRule, SkipPolicy, TokenClass
from fastskip.routing import Decisions, Router
from fastskip.study.calibration.observation import Observer, Scores
from fastskip.study.calibration.shares import Share, by_threshold, pooled
from fastskip.study.calibration.thresholds import bar_for, bounds_of
from fastskip.study.calls import placed
from fastskip.tokens import member


class CalibrationError(ValueError):
    """Calibration is not possible; says why and what is needed."""


@dataclass(slots=True)
class Sweep:
    """What was observed under one policy: shares, and scores by router and layer."""

    policy: SkipPolicy
    shares: tuple[Share, ...] = ()
    scores: Scores = field(default_factory=dict)

    def scores_of(self, number: int) -> Tensor:
        """The scores of a router's candidates, over all of its layers."""
        return torch.cat([x for (n, _), own in self.scores.items() if n == number for x in own])

    def is_near(self, wanted: float, tolerance: float) -> bool:
        """Whether every share is within the tolerance of the closest one possible."""
        return max(self.excess(wanted), default=0) <= tolerance

    def excess(self, wanted: float) -> list[float]:
        """Per threshold: how much further its share is from the target than the best possible."""
        return [
            abs(pooled(group) - wanted) - abs(group[0].possible - wanted)
            for group in by_threshold(self.shares)
            if group[0].possible is not None
        ]


def run_sweep(
    model: Any,
    policy: SkipPolicy,
    rate: float,
    samples: Sequence[Mapping[str, Any]],
    new_tokens: int,
    on_sample: Callable[[], object],
) -> Sweep:
    """Run all samples under a policy."""
    sweep, plan = Sweep(policy), plan_of(set_policy(model, policy))
    cells = sorted({(routed.number, routed.layer) for routed in plan.routed})
    counts = dict.fromkeys(cells, (0, 0))

    def observed(number: int, router: Router) -> Router:
        return Observer(router, number, sweep.scores)

    for inputs in samples:
        given = placed(inputs, model)
        with watching_routers(model, observed), record_routing(model) as record:
            model.generate(**given, do_sample=False, max_new_tokens=new_tokens)
        for decisions in record.forwards:
            for number, layer in cells:
                asked, skipped = _count(decisions, layer, policy.routers[number])
                before = counts[number, layer]
                counts[number, layer] = before[0] + asked, before[1] + skipped
        on_sample()
    shares = [Share(n, layer, policy.routers[n], *counts[n, layer]) for n, layer in cells]
    _check_candidates(shares)
    sweep.shares = tuple(
        replace(share, possible=_possible(sweep, share.router, rate)) for share in shares
    )
    return sweep


def _count(decisions: Decisions, layer: int, rule: RouterRule) -> tuple[int, int]:
    """Candidates of a rule in one layer and one forward, and how many of them skipped."""
    # A rule skips all of its sublayers or none, so looking at one of them is enough.
    key = layer, min(rule.skip)
    if key not in decisions.candidates:
        return 0, 0
    classes = frozenset(TokenClass) if rule.tokens == "all" else rule.tokens
    asked = decisions.candidates[key] & member(decisions.codes, classes)
    return int(asked.sum()), int((asked & decisions.skipped[key]).sum())


def _possible(sweep: Sweep, number: int, rate: float) -> float | None:
    rule = sweep.policy.routers[number]
    if rule.threshold is None:
        return None
    found = bar_for(sweep.scores_of(number), rate, *bounds_of(rule))
    return 0.0 if found is None else found[1]


def _check_candidates(shares: Sequence[Share]) -> None:
    for share in shares:
        if not share.candidates and share.rule.threshold is not None:
            tokens = share.rule.to_dict()["tokens"]
            raise CalibrationError(
                f"samples: none has a row that routers[{share.router}] decides on in layer "
                f"{share.layer} (tokens: {tokens}); allowed: samples with such rows (generated "
                "rows need new_tokens of 2 or more, and answers of at least 2 tokens)"
            )
