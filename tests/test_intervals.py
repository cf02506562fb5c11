"""Intervals against what can be enumerated or is known."""

from itertools import product

import numpy as np
import pytest

from fastskip.intervals import (
    Estimate,
    Spread,
    bootstrap,
    mean_difference,
    mean_score,
    paired_bootstrap,
    paired_shares,
    paired_speedup,
    quartiles,
    wilson,
)


def every_resample(values: list[float]) -> np.ndarray:
    """The means of all n^n equally likely resamples."""
    return np.array([np.mean(drawn) for drawn in product(values, repeat=len(values))])


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_bootstrap_is_near_all_resamples(level: float) -> None:
    values = [0.0, 0.3, 0.9, 1.0, 0.2, 0.7]
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(every_resample(values), [tail, 100 - tail])
    found = bootstrap(values, level=level, resamples=40_000)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.012)


def test_bootstrap_in_parts_covers_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastskip.intervals._CELLS", 50)
    values = [0.0, 0.3, 0.9, 1.0, 0.2, 0.7]
    low, high = np.percentile(every_resample(values), [2.5, 97.5])
    found = bootstrap(values, resamples=20_001)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def test_pairs_tell_apart_what_single_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    first = (rng.random(300) > hard).astype(float)
    second = np.where(rng.random(300) < 0.15, 1.0, first)  # the same answers, some now right
    difference = paired_bootstrap(first, second)
    assert difference.is_above_zero and not difference.is_below_zero
    assert difference.mean == pytest.approx(second.mean() - first.mean())
    assert bootstrap(first).high > bootstrap(second).low
    reverse = paired_bootstrap(second, first)
    assert reverse.is_below_zero
    assert (reverse.low, reverse.high) == pytest.approx(
        (-difference.high, -difference.low), abs=0.01
    )


def test_equal_models_do_not_differ() -> None:
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == Estimate(0.0, 0.0, 0.0)


def test_right_or_wrong_shares_get_intervals_of_proportions() -> None:
    right, wrong, soft = [1.0] * 4, [0.0] * 4, [1.0, 1.0, 1.0, 0.5]
    assert mean_score(right, is_share=True) == wilson(4, 4)
    assert mean_score(right, is_share=False) == bootstrap(right)
    assert mean_score(soft, is_share=True, seed=2) == bootstrap(soft, seed=2)
    assert mean_difference(wrong, right, is_share=True) == paired_shares(wrong, right)
    assert mean_difference(wrong, right, is_share=False) == paired_bootstrap(wrong, right)
    for first, second in ((soft, right), (right, soft)):
        found = mean_difference(first, second, is_share=True, seed=2)
        assert found == paired_bootstrap(first, second, seed=2)


def right(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two models, by how many items both answer right, one of them alone, or none."""
    cases = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, first, second, neither], axis=0)
    return cases[:, 0] * 1.0, cases[:, 1] * 1.0


def test_shares_of_pairs_known_values() -> None:
    # Newcombe's own tables: (36, 12, 2, 0) and (54, 0, 0, 0) by method 10, first minus second
    first, second = right(36, 12, 2, 0)
    found = paired_shares(second, first)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    same = paired_shares(*right(54, 0, 0, 0))
    assert (same.mean, same.low, same.high) == pytest.approx((0, -0.0664, 0.0664), abs=1e-4)


@pytest.mark.parametrize("count", [4, 16, 100])
def test_differences_of_shares_are_covered(count: int) -> None:
    """Where a bootstrap is not: of items that mostly do not differ."""
    rng, hits, resampled = np.random.default_rng(0), 0, 0
    for both, only, other, neither in rng.multinomial(count, [0.8, 0.02, 0.01, 0.17], 300):
        first, second = right(both, only, other, neither)
        found, drawn = paired_shares(first, second), paired_bootstrap(first, second)
        hits += found.low <= -0.01 <= found.high
        resampled += drawn.low <= -0.01 <= drawn.high
    assert hits >= 0.94 * 300 and resampled < hits


def test_few_items_tell_nothing_apart() -> None:
    one = paired_shares([1.0], [0.0])
    assert one.mean == -1 and not one.is_below_zero
    # three of eight are lost: a sign test gives p = 0.25
    assert not paired_shares(*right(5, 3, 0, 0)).is_below_zero
    assert paired_shares(*right(42, 8, 0, 0)).is_below_zero
    assert paired_shares(*right(42, 0, 8, 0)).is_above_zero


def test_a_seed_decides_the_interval() -> None:
    values = np.random.default_rng(1).random(50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_wilson_known_values() -> None:
    # 0 of 10 and 5 of 10, as tables have them
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    found = wilson(5, 10)
    assert (found.low, found.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10).high == 1.0 and wilson(10, 10).low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "scores: shape"),
        (lambda: bootstrap([[1.0]]), "scores: shape"),  # type: ignore[list-item]
        (lambda: bootstrap([1.0], resamples=0), "resamples: 0"),
        (lambda: bootstrap([1.0], level=1.0), "level: 1.0"),
        (lambda: paired_bootstrap([1.0], [1.0, 0.0]), "the same items"),
        (lambda: paired_shares([1.0], [1.0, 0.0]), "the same items"),
        (lambda: paired_shares([1.0], [0.5]), "neither 0 nor 1"),
        (lambda: paired_shares([], []), "right, asked: 0.0, 0"),
        (lambda: wilson(3, 2), "right, asked: 3, 2"),
        (lambda: wilson(0, 0), "right, asked: 0, 0"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_speedups_of_many_rounds_lie_between_two_of_them() -> None:
    base = [2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 90.0]
    # Nine rounds: P(at most one ratio below the median) = 10 / 512, so the second and the eighth.
    found = paired_speedup(base, [2.0] * 9)
    assert (found.median, found.low, found.high) == pytest.approx((1.4, 1.1, 1.7))
    # Six rounds: P(none below) = 1 / 64, so the first and the last.
    found = paired_speedup(base[:6], [2.0] * 6)
    assert (found.median, found.low, found.high) == pytest.approx((1.25, 1.0, 1.5))


@pytest.mark.parametrize("count", [6, 9, 20])
def test_medians_are_covered(count: int) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        noise = rng.lognormal(0, 0.3, (2, count)) * np.where(rng.random((2, count)) < 0.1, 5, 1)
        found = paired_speedup(noise[0], noise[1])
        hits += found.low <= 1 <= found.high
    assert hits >= 935


def test_speedups_of_few_rounds_are_students() -> None:
    # Logarithms 0, 1, 2: mean 1, deviation 1; t = 4.303 with two degrees of freedom.
    found = paired_speedup([np.exp(2), 1.0, np.e], [1.0, 1.0, 1.0])
    half = 4.303 / np.sqrt(3)
    ends = pytest.approx((np.exp(1 - half), np.exp(1 + half)))
    assert (found.low, found.high) == ends and found.median == pytest.approx(np.e)


def test_quartiles() -> None:
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert quartiles([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="values: none"):
        quartiles([])


@pytest.mark.parametrize(
    ("base", "own", "message"),
    [
        ([1.0, 2.0], [1.0], "rounds:"),
        ([1.0], [1.0], "two or more"),
        ([1.0, 0.0], [1.0, 1.0], "seconds:"),
        ([1.0, 1.0], [1.0, float("nan")], "seconds:"),
    ],
)
def test_no_speedup_of_these(base: list[float], own: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_speedup(base, own)
