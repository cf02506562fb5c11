"""Where a bar has to stand so that a wanted share of scores reaches it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastskip.policy import Measure, RouterRule


def bar_for(scores: Tensor, rate: float, low: float, high: float) -> tuple[float, float] | None:
    """The bar in [low, high] that a share nearest to `rate` of `scores` reaches, and that share.

    Equal scores reach a bar together, so that not every share is possible; of two that are equally
    near the smaller one is taken. The bar stands in the middle between the two scores that it
    divides, where rounding does no harm. Infinite scores count and reach none. `None`: no bar in
    the bounds divides anything.
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
    """Between which bars a threshold may lie: scores are wishes to skip (`fastskip.ops.routes`)."""
    if rule.kind == "linear":
        return -math.inf, math.inf
    return (-math.inf, 0.0) if rule.measure is Measure.CHANGE else (-1.0, 1.0)


def threshold_of(rule: RouterRule, bar: float | None) -> float:
    """The threshold that a bar is in the policy's words, and the other way round."""
    assert bar is not None
    is_cosine = rule.kind == "similarity" and rule.measure is not Measure.CHANGE
    return bar if is_cosine else 0.0 - bar


def _bar(values: Tensor, cut: int, low: float, high: float) -> float | None:
    """A bar that the first `cut` of some falling values reach and the others do not."""
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
