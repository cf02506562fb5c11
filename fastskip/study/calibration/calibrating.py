"""Set router thresholds so that a target share of rows skips.

Each sweep runs the samples under the current thresholds, counts the rows that skip, and moves every
threshold to where the target share of the observed scores reaches it. A layer's decisions change
the scores of the layers above it, so sweeps repeat: the lowest layer is right after one sweep, the
next one after two. The result is the best sweep measured; the target is not guaranteed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from fastskip.loading import plan_of, set_policy
from fastskip.policy import PolicyError, RouterRule, SkipPolicy, select_layers
from fastskip.policy_fit import made_for
from fastskip.study.calibration.shares import Share, by_threshold, pooled
from fastskip.study.calibration.sweep import CalibrationError, Sweep, run_sweep
from fastskip.study.calibration.thresholds import bar_for, bounds_of, threshold_of
from fastskip.study.counts import check_counts
from fastskip.study.provenance import circumstances


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
    seen: list[Sweep] = []
    try:
        while len(seen) < sweeps:
            seen.append(run_sweep(model, policy, rate, samples, new_tokens, on_sample))
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
    check_counts(
        CalibrationError,
        samples=(len(samples), 1),
        new_tokens=(new_tokens, 1),
        sweeps=(sweeps, 1),
    )
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


def _moved(seen: Sequence[Sweep], rate: float, per: Per) -> SkipPolicy:
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


def _between(seen: Sequence[Sweep], number: int, bar: float, rate: float) -> float:
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
