"""Confidence intervals of proportions, means, differences between two models, and speed-ups.

Differences are paired by item: item difficulty is common to two models that answer the same items,
so far fewer items distinguish them than with two separate intervals. For right-or-wrong answers the
interval follows from the counts of all four outcomes; otherwise it is a paired bootstrap (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Scores = Sequence[float] | NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 4_000_000
"""Numbers drawn at once: bounds the memory of a bootstrap to tens of MB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high < 0

    @property
    def in_points(self) -> tuple[str, str]:
        """A difference of scores times 100 and its interval, with signs: "+1.5", "-0.2 to +3.1"."""
        mean, low, high = (f"{100 * each:+.1f}" for each in (self.mean, self.low, self.high))
        return mean, f"{low} to {high}"


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles or the ends of its confidence interval."""

    median: float
    low: float
    high: float


class Verdict(StrEnum):
    """How a policy's scores compare with others' on the same items, at 95 %."""

    BETTER = "better"
    NOT_TOLD_APART = "not told apart"
    WORSE = "worse"

    @classmethod
    def of(cls, difference: Estimate) -> Verdict:
        """The verdict for the interval of the differences."""
        if difference.is_above_zero:
            return cls.BETTER
        return cls.WORSE if difference.is_below_zero else cls.NOT_TOLD_APART


class SpeedVerdict(StrEnum):
    """How a contender's times compare with our dense model's over the rounds, at 95 %."""

    FASTER = "faster"
    SLOWER = "slower"
    NOT_TOLD_APART = "not told apart"

    @classmethod
    def of(cls, speedup: Spread) -> SpeedVerdict:
        """The verdict for the interval of the speed-up."""
        if speedup.low > 1:
            return cls.FASTER
        return cls.SLOWER if speedup.high < 1 else cls.NOT_TOLD_APART


def wilson(right: float, asked: int) -> Estimate:
    """The proportion `right / asked` with Wilson's interval, valid for few items and near 0 or 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).

    Raises:
        ValueError: `asked` is not positive, or `right` is not in [0, asked].
    """
    if asked < 1 or not 0 <= right <= asked:
        raise ValueError(f"right, asked: {right}, {asked}; allowed: 0 <= right <= asked, asked > 0")
    share, z = right / asked, NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    spread = math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    half = z * spread / (1 + z * z / asked)
    # exactly 0 and 1, despite rounding
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == asked else middle + half
    return Estimate(share, low, high)


def mean_score(scores: Scores, *, is_share: bool, seed: int = 0) -> Estimate:
    """The mean score of the items with its interval.

    Wilson's if every item is either right or wrong, as it also holds for few items and near 1;
    otherwise the bootstrap's.

    Args:
        scores: one per item.
        is_share: whether they are shares: other scores, such as CIDEr, are never right or wrong,
            even if all of them are 0 or 1.
        seed: of the bootstrap.
    """
    if is_share and _are_right_or_wrong(scores):
        return wilson(float(sum(scores)), len(scores))
    return bootstrap(scores, seed=seed)


def mean_difference(first: Scores, second: Scores, *, is_share: bool, seed: int = 0) -> Estimate:
    """How much better `second` scores than `first` on the same items, with its interval.

    By paired shares if every item of both is either right or wrong, as in `mean_score`; otherwise
    by the paired bootstrap.
    """
    if is_share and _are_right_or_wrong(first, second):
        return paired_shares(first, second)
    return paired_bootstrap(first, second, seed=seed)


def _are_right_or_wrong(*scores: Scores) -> bool:
    return all(np.isin(each, (0.0, 1.0)).all() for each in scores)


def bootstrap(
    scores: Scores,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The mean score of the items with its percentile interval over resampled items.

    Raises:
        ValueError: there are no scores, or an option is out of range.
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


def paired_shares(first: Scores, second: Scores) -> Estimate:
    """The proportion that `second` answers right minus that of `first`, on the same items.

    Combines the Wilson intervals of both proportions and their correlation, which is valid even
    where few items or none differ. A bootstrap is not: resampling items that agree never yields a
    difference, so it treats a loss that was not observed as impossible.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998), method 10.

    Raises:
        ValueError: the items are not the same, there are none, or a score is neither 0 nor 1.
    """
    a, b = _paired(first, second)
    if not np.isin([a, b], (0.0, 1.0)).all():
        raise ValueError("scores: some are neither 0 nor 1; allowed: right or wrong")
    before, after = (wilson(float(each.sum()), len(each)) for each in (a, b))
    concordant = float(np.sum((1 - a) * (1 - b)) * np.sum(a * b))
    covariance = concordant - float(np.sum(a * (1 - b)) * np.sum((1 - a) * b))
    if covariance > 0:
        covariance = max(covariance - len(a) / 2, 0.0)
    sums = [float(each) for own in (a, b) for each in (own.sum(), (1 - own).sum())]
    phi = covariance / math.sqrt(math.prod(sums)) if all(sums) else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    mean = after.mean - before.mean
    return Estimate(
        mean,
        max(-1.0, mean - reach(after.mean - after.low, before.high - before.mean)),
        min(1.0, mean + reach(after.high - after.mean, before.mean - before.low)),
    )


def paired_bootstrap(
    first: Scores,
    second: Scores,
    *,
    seed: int = 0,
) -> Estimate:
    """How much better `second` scores than `first` on the same items in the same order.

    Raises:
        ValueError: the items are not the same, or as in `bootstrap`.
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
    """The speed-up of `own` over `base`, from seconds of the same rounds: the median of the rounds'
    ratios with its 95 % interval.

    From six rounds on, the interval is bounded by two of the ratios and makes no assumption about
    their distribution (inverted sign test: Conover, "Practical Nonparametric Statistics", 1999,
    section 3.2); one disturbed round barely moves it. Fewer rounds allow no such interval; they get
    Student's, on the logarithms of the ratios.

    Raises:
        ValueError: the numbers of rounds differ or are below two, or a time is not positive.
    """
    before, after = np.asarray(base, np.float64), np.asarray(own, np.float64)
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        shapes = f"{before.shape} and {after.shape}"
        raise ValueError(f"rounds: {shapes}; allowed: the same number of rounds, two or more")
    if not (np.isfinite(before) & np.isfinite(after) & (before > 0) & (after > 0)).all():
        raise ValueError("seconds: some are not positive; allowed: positive numbers")
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
    """How many values lie below the 95 % interval of a median; as many lie above it."""
    most, chance, found = (1 - LEVEL) / 2, 0.0, -1
    while (chance := chance + math.comb(count, found + 1) / 2**count) <= most:
        found += 1
    return found


def _paired(first: Scores, second: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"scores: shapes {a.shape} and {b.shape}; allowed: the same items in both")
    return a, b
