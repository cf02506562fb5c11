"""How sure a number is: intervals of shares, of means, of differences between two models, and of
how many times as fast one is.

Differences are taken item by item: two models that answer the same items share what makes an item
hard, so that far fewer items tell them apart than two separate intervals would need. Where answers
are right or wrong, by the shares of all four cases; else by a paired bootstrap (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 4_000_000
"""Numbers drawn at once: bounds the memory of a bootstrap to some tens of MB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the ends of what it is told with: quartiles, or a confidence interval."""

    median: float
    low: float
    high: float


def wilson(right: float, asked: int) -> Estimate:
    """The share `right / asked` with Wilson's interval, which holds at few items and near 1 too.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).

    Raises:
        ValueError: `asked` is not positive, or `right` not in [0, asked].
    """
    if asked < 1 or not 0 <= right <= asked:
        raise ValueError(f"right, asked: {right}, {asked}; allowed: 0 <= right <= asked, asked > 0")
    share, z = right / asked, NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    spread = math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    half = z * spread / (1 + z * z / asked)
    # the ends are 0 and 1 there; rounding would miss them
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == asked else middle + half
    return Estimate(share, low, high)


def bootstrap(
    scores: Sequence[float] | NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The mean of items' scores with its percentile interval over resampled items.

    Raises:
        ValueError: there are no scores, or an option is out of its range.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores: shape {values.shape}; allowed: one dimension, not empty")
    if resamples < 1:
        raise ValueError(f"resamples: {resamples}; allowed: 1 or more")
    if not 0 < level < 1:
        raise ValueError(f"level: {level}; allowed: a share in (0, 1)")
    tail = 100 * (1 - level) / 2
    rng, means, count = np.random.default_rng(seed), [], len(values)
    at_once = max(1, _CELLS // count)
    for start in range(0, resamples, at_once):
        drawn = rng.integers(count, size=(min(at_once, resamples - start), count))
        means.append(values[drawn].mean(1))
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_shares(
    first: Sequence[float] | NDArray[np.float64],
    second: Sequence[float] | NDArray[np.float64],
) -> Estimate:
    """How much larger the share of items is that `second` answers right, of the same items.

    From Wilson's intervals of both shares and how they go together, which holds where few items
    differ or none: resampled items that do not differ never will, so that a bootstrap takes a loss
    that it has not seen for one that is not there.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998), method 10.

    Raises:
        ValueError: the two have not the same items, there are none, or a score is neither 0 nor 1.
    """
    a, b = _paired(first, second)
    if not np.isin([a, b], (0.0, 1.0)).all():
        raise ValueError("scores: some are neither 0 nor 1; allowed: right or wrong")
    before, after = (wilson(float(each.sum()), len(each)) for each in (a, b))
    together = float(np.sum((1 - a) * (1 - b)) * np.sum(a * b))
    crossed = together - float(np.sum(a * (1 - b)) * np.sum((1 - a) * b))
    if crossed > 0:
        crossed = max(crossed - len(a) / 2, 0.0)
    sums = [float(each) for own in (a, b) for each in (own.sum(), (1 - own).sum())]
    alike = crossed / math.sqrt(math.prod(sums)) if all(sums) else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * alike * one * other + other * other))

    mean = after.mean - before.mean
    return Estimate(
        mean,
        max(-1.0, mean - reach(after.mean - after.low, before.high - before.mean)),
        min(1.0, mean + reach(after.high - after.mean, before.mean - before.low)),
    )


def paired_bootstrap(
    first: Sequence[float] | NDArray[np.float64],
    second: Sequence[float] | NDArray[np.float64],
    *,
    seed: int = 0,
) -> Estimate:
    """How much better `second` scores than `first` on the same items in the same order.

    Raises:
        ValueError: the two have not the same items, or as in `bootstrap`.
    """
    a, b = _paired(first, second)
    return bootstrap(b - a, seed=seed)


def quartiles(values: Sequence[float]) -> Spread:
    """The median and the two quartiles.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("values: none; allowed: one or more")
    low, middle, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return Spread(float(middle), float(low), float(high))


_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t, by the number of values."""


def paired_speedup(base: Sequence[float], own: Sequence[float]) -> Spread:
    """How many times as fast `own` is as `base`, from seconds in the same rounds: the median of the
    rounds' ratios with its 95 % interval.

    Of six rounds or more, the interval lies between two of the ratios, whatever their distribution
    (the sign test, turned round: Conover, "Practical Nonparametric Statistics", 1999, section 3.2);
    one round that something disturbed does not move it much. Fewer can give no such interval; there
    it is Student's, of the ratios' logarithms.

    Raises:
        ValueError: the two have not as many rounds, fewer than two, or times that are not positive.
    """
    before, after = np.asarray(base, np.float64), np.asarray(own, np.float64)
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        shapes = f"{before.shape} and {after.shape}"
        raise ValueError(f"rounds: {shapes}; allowed: the same number of rounds, two or more")
    if not (np.isfinite(before) & np.isfinite(after) & (before > 0) & (after > 0)).all():
        raise ValueError("seconds: allowed: positive numbers")
    ratios = np.sort(before / after)
    middle, count = float(np.median(ratios)), len(ratios)
    if count in _STUDENT:
        logs = np.log(ratios)
        half = _STUDENT[count] * float(logs.std(ddof=1)) / math.sqrt(count)
        centre = float(logs.mean())
        return Spread(middle, math.exp(centre - half), math.exp(centre + half))
    outside = _outside(count)
    return Spread(middle, float(ratios[outside]), float(ratios[-1 - outside]))


def _outside(count: int) -> int:
    """How many values lie below the 95 % interval of a median, and as many above it."""
    most, chance, found = (1 - LEVEL) / 2, 0.0, -1
    while (chance := chance + math.comb(count, found + 1) / 2**count) <= most:
        found += 1
    return found


def _paired(
    first: Sequence[float] | NDArray[np.float64], second: Sequence[float] | NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"scores: shapes {a.shape} and {b.shape}; allowed: the same items in both")
    return a, b
