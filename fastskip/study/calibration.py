"""Set router thresholds so that a target share of rows skips.

Each sweep runs the samples under the current thresholds, counts the rows that skip, and moves every
threshold to where the target share of the observed scores reaches it. A layer's decisions change
the scores of the layers above it, so sweeps repeat: the lowest layer is right after one sweep, the
next one after two. The result is the best sweep measured; the target is not guaranteed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from fastskip.loading import plan_of, record_routing, set_policy, watching_routers
from fastskip.policy import PolicyError, RouterRule, SkipPolicy, TokenClass, select_layers
from fastskip.policy_fit import made_for
from fastskip.routing import Decisions, Router
from fastskip.study.observation import Observer, Scores
from fastskip.study.provenance import circumstances
from fastskip.study.samples import placed
from fastskip.study.shares import Share, by_threshold, pooled
from fastskip.study.thresholds import bar_for, bounds_of, threshold_of
from fastskip.tokens import member


class CalibrationError(ValueError):
    """Calibration is not possible; says why and what is needed."""


class Per(StrEnum):
    """How far a threshold reaches: one layer of a rule, or the whole rule."""

    LAYER = "layer"
    OVERALL = "overall"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A policy with its thresholds set, and how close it comes to the target on the samples.

    `shares`: one per router and layer, measured under exactly this policy.
    """

    policy: SkipPolicy
    wanted: float
    per: Per
    tolerance: float
    sweeps: int
    shares: tuple[Share, ...]

    @property
    def achieved(self) -> float:
        """The share of all candidates that skipped."""
        return pooled(self.shares)

    @property
    def is_reached(self) -> bool:
        """Whether every threshold meets the target share within the tolerance."""
        return self.gap <= self.tolerance

    @property
    def gap(self) -> float:
        """The largest deviation of any threshold's share from the target."""
        groups = by_threshold(self.shares)
        return max((abs(pooled(group) - self.wanted) for group in groups), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "wanted": self.wanted,
            "achieved": round(self.achieved, 6),
            "per": self.per.value,
            "tolerance": self.tolerance,
            "is_reached": self.is_reached,
            "sweeps": self.sweeps,
            "cells": [share.to_dict() for share in self.shares],
        }


@dataclass(slots=True)
class _Sweep:
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


def calibrate(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    rate: float,
    *,
    per: Per | str = Per.LAYER,
    new_tokens: int = 16,
    sweeps: int = 8,
    tolerance: float = 0.02,
    about: Mapping[str, Any] | None = None,
    on_sample: Callable[[], object] = lambda: None,
) -> Calibration:
    """Set a prepared model's routers so that a share `rate` of their candidates skips on `samples`.

    Thresholds of similarity and linear routers are searched for; a linear router's capacity is set
    to `1 - rate`, a random router's rate to `rate`. The model ends up under the resulting policy,
    or under its previous one if anything fails.

    Args:
        model: prepared by `fastskip.load_model(..., impl="reference")`; its policy has routers.
        samples: inputs of `generate`, each as returned by `processor(...)`. Routers that decide
            per batch treat each sample as one batch.
        rate: the share in [0, 1] that should skip.
        per: "layer": one threshold per layer, so the policy gets one rule per layer; "overall": one
            threshold per rule, shared by all of its layers.
        new_tokens: how many tokens each sample generates; with 1 there are only prompt rows.
        sweeps: maximum number of passes over the samples.
        tolerance: how far a share may be from the target to count as reached; sweeps stop early
            once all are this close to the best possible.
        about: further entries for the policy's provenance, such as where the samples came from.
        on_sample: called after each sample of each sweep.
    Raises:
        PolicyError: the policy has no routers, has one that cannot be calibrated, or has one that
            cannot take `rate`.
        CalibrationError: there are no samples, or some router decides on no row of any of them.
        UnsupportedModelError: the model does not run on plain torch.
    """
    per = _checked(per, rate, samples, new_tokens, sweeps)
    plan = plan_of(model)
    policy = _start(plan.policy, rate, per, plan.shape.depth)
    seen: list[_Sweep] = []
    try:
        while len(seen) < sweeps:
            seen.append(_run(model, policy, rate, samples, new_tokens, on_sample))
            following = _moved(seen, rate, per)
            if seen[-1].is_near(rate, tolerance) or following == policy:
                break
            if any(following == earlier.policy for earlier in seen):
                following = _halfway(policy, following)  # answers change too: this is a cycle
            policy = following
        best = min(seen, key=lambda s: (not s.is_near(rate, tolerance), sum(s.excess(rate))))
        found = Calibration(best.policy, rate, per, tolerance, len(seen), best.shares)
        written = {
            **found.to_dict(),
            "samples": len(samples),
            "new_tokens": new_tokens,
            **circumstances(model),
            **(about or {}),
        }
        provenance = {
            **best.policy.provenance,
            "calibration": written,
            "made_for": made_for(model),
        }
        found = replace(found, policy=replace(best.policy, provenance=provenance))
        set_policy(model, found.policy)
    except BaseException:
        set_policy(model, plan.policy)
        raise
    return found


def _checked(
    per: Per | str, rate: float, samples: Sequence[Any], new_tokens: int, sweeps: int
) -> Per:
    if per not in tuple(Per):
        raise CalibrationError(f"per: {per!r}; allowed: {', '.join(Per)}")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise CalibrationError(f"rate: {rate!r}; allowed: a share in [0, 1]")
    for name, value in (("samples", len(samples)), ("new_tokens", new_tokens), ("sweeps", sweeps)):
        if value < 1:
            raise CalibrationError(f"{name}: {value}; allowed: 1 or more")
    return Per(per)


def _start(policy: SkipPolicy, rate: float, per: Per, depth: int) -> SkipPolicy:
    """The policy with rates and capacities set, and one rule per threshold to be found."""
    if not policy.routers:
        raise PolicyError("routers", [], "a policy with routers", "nothing to calibrate")
    rules: list[RouterRule] = []
    for number, rule in enumerate(policy.routers):
        name = f"routers[{number}]"
        if rule.is_plug_in:
            allowed = "similarity, linear, random (a plug-in's decisions cannot be calibrated)"
            raise PolicyError(f"{name}.kind", rule.kind, allowed)
        if rule.rate is not None:
            rules.append(replace(rule, rate=rate))
        elif rule.capacity is not None:
            if rate == 1:
                problem = f"would be 1 - rate = 0 at a rate of {rate}"
                raise PolicyError(f"{name}.capacity", 0, "a rate below 1", problem)
            # rounded, since a capacity of 0.30000000000000004 would run four of ten rows
            rules.append(replace(rule, capacity=round(1 - rate, 12)))
        elif per is Per.LAYER:
            layers = select_layers(rule.layers, depth, f"{name}.layers")
            rules += (replace(rule, layers=(layer,)) for layer in layers)
        else:
            rules.append(rule)
    return replace(policy, routers=tuple(rules))


def _run(
    model: Any,
    policy: SkipPolicy,
    rate: float,
    samples: Sequence[Mapping[str, Any]],
    new_tokens: int,
    on_sample: Callable[[], object],
) -> _Sweep:
    """Run all samples under a policy."""
    sweep, plan = _Sweep(policy), plan_of(set_policy(model, policy))
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


def _possible(sweep: _Sweep, number: int, rate: float) -> float | None:
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


def _moved(seen: Sequence[_Sweep], rate: float, per: Per) -> SkipPolicy:
    """The policy with every threshold moved to where the last sweep's scores put it."""
    sweep = seen[-1]
    rules = list(sweep.policy.routers)
    for number, rule in enumerate(rules):
        if rule.threshold is None:
            continue
        found = bar_for(sweep.scores_of(number), rate, *bounds_of(rule))
        if found is not None:
            bar = found[0] if per is Per.LAYER else _between(seen, number, found[0], rate)
            rules[number] = replace(rule, threshold=threshold_of(rule, bar))
    return replace(sweep.policy, routers=tuple(rules))


def _halfway(policy: SkipPolicy, further: SkipPolicy) -> SkipPolicy:
    """The policy with every threshold moved half as far."""
    rules = tuple(
        a
        if a.threshold is None or b.threshold is None
        else replace(a, threshold=(a.threshold + b.threshold) / 2)
        for a, b in zip(policy.routers, further.routers, strict=True)
    )
    return replace(policy, routers=rules)


def _between(seen: Sequence[_Sweep], number: int, bar: float, rate: float) -> float:
    """A bar for several layers at once, whose decisions change one another's scores.

    It lies between the bars that have so far let too many and too few rows skip: `bar` if that
    does, else their midpoint.
    """
    too_low, too_high = -math.inf, math.inf
    for sweep in seen:
        tried = threshold_of(sweep.policy.routers[number], sweep.policy.routers[number].threshold)
        share = pooled([share for share in sweep.shares if share.router == number])
        if share > rate:
            too_low = max(too_low, tried)
        elif share < rate:
            too_high = min(too_high, tried)
    if too_low < bar < too_high or not math.isfinite(too_high - too_low) or too_low >= too_high:
        return bar
    return (too_low + too_high) / 2
