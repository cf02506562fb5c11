"""Find the bar that a target share of scores reaches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastskip.policy import Measure, RouterRule


def bar_for(scores: Tensor, rate: float, low: float, high: float) -> tuple[float, float] | None:
    """The bar in [low, high] reached by the share of `scores` closest to `rate`, and that share.

    Equal scores reach a bar together, so not every share is possible; of two equally close shares
    the smaller is chosen. The bar lies midway between the two scores that it separates, so that
    rounding does no harm. Non-finite scores count towards the total but reach no bar. `None`: no
    score is finite, or no bar within the bounds gives a possible share.
    """
    total = len(scores)
    values, counts = torch.unique(scores[scores.isfinite()].double(), return_counts=True)
    if not len(values):
        return None
    values = values.flip(0)
    reaching = torch.cat((torch.zeros(1), counts.flip(0).cumsum(0))).double() / total
    for cut in torch.argsort((reaching - rate).abs(), stable=True).tolist():
        bar = _bar(values, cut, low, high)
        if bar is not None:
            return bar, float(reaching[cut])
    return None


def bounds_of(rule: RouterRule) -> tuple[float, float]:
    """The allowed range of bars: a score is the wish to skip (`fastskip.ops.routes`)."""
    if rule.kind == "linear":
        return -math.inf, math.inf
    return (-math.inf, 0.0) if rule.measure is Measure.CHANGE else (-1.0, 1.0)


def threshold_of(rule: RouterRule, bar: float | None) -> float:
    """Convert a bar to the policy's threshold; the conversion is its own inverse."""
    assert bar is not None
    is_cosine = rule.kind == "similarity" and rule.measure is not Measure.CHANGE
    return bar if is_cosine else 0.0 - bar


def _bar(values: Tensor, cut: int, low: float, high: float) -> float | None:
    """A bar that exactly the first `cut` of some descending values reach."""
    beyond = max(float(values[0] - values[-1]) / 20, float(values.abs().max()) / 1000, 1e-6)
    above = float(values[cut - 1]) if cut else float(values[0]) + beyond
    below = float(values[cut]) if cut < len(values) else float(values[-1]) - beyond
    for bar in (_short(below, above), above):
        bounded = min(max(bar, low), high)
        # Routers compare in fp32.
        compared = float(torch.tensor(bounded, dtype=torch.float32))
        if below < compared <= above or (cut == len(values) and compared <= above):
            return bounded
    return None


def _short(below: float, above: float) -> float:
    """The shortest decimal near the middle between two numbers."""
    middle, slack = (below + above) / 2, (above - below) / 4
    for digits in range(1, 17):
        found = float(f"{middle:.{digits}g}")
        if abs(found - middle) <= slack:
            return found
    return middle
