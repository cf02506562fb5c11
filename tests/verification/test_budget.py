"""The error budget: what it lets pass and what it does not."""

import pytest
import torch

from fastskip.verification.budget import BAND, measure
from tests.budget import assert_within_budget

TRUTH = torch.linspace(-2, 2, 101, dtype=torch.float64)
EAGER = TRUTH.to(torch.bfloat16)


def test_rounding_once_is_within_budget() -> None:
    budget = measure("x", EAGER, EAGER, TRUTH)
    assert budget.holds
    assert budget.error == budget.eager_error > 0


def test_three_times_the_eager_error_and_a_band_are_the_limit() -> None:
    eager = TRUTH + 1e-3
    assert measure("x", TRUTH + 3e-3, eager, TRUTH).holds
    band = BAND * torch.finfo(torch.float64).eps * 2
    assert not measure("x", TRUTH + 3e-3 + 3 * band, eager, TRUTH).holds


def test_exact_eager_leaves_the_band() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    eager = truth.float()
    assert measure("x", eager + 2e-7, eager, truth).holds
    assert not measure("x", eager + 2e-6, eager, truth).holds


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_never_holds(bad: float) -> None:
    actual = EAGER.clone()
    actual[40] = bad
    with pytest.raises(AssertionError, match=r"^scores: error inf at \[40\]"):
        assert_within_budget("scores", actual, EAGER, TRUTH)


def test_an_eager_result_without_bounds_allows_nothing() -> None:
    eager = EAGER.clone()
    eager[7] = torch.inf  # say, an overflow of fp16
    wrong = torch.full_like(EAGER, torch.nan)
    assert not measure("x", wrong, eager, TRUTH).holds
    assert not measure("x", torch.zeros_like(EAGER), eager, TRUTH).holds


def test_only_the_rows_asked_for_count() -> None:
    actual = EAGER.clone()
    actual[40] = torch.nan
    assert_within_budget("scores", actual, EAGER, TRUTH, rows=torch.arange(101) != 40)


def test_refuses_comparisons_without_meaning() -> None:
    with pytest.raises(ValueError, match="shapes"):
        measure("x", EAGER[:1], EAGER, TRUTH)
    with pytest.raises(ValueError, match="nothing to compare"):
        measure("x", EAGER[:0], EAGER[:0], TRUTH[:0])
    with pytest.raises(ValueError, match=r"bfloat16.*float32|float32.*bfloat16"):
        measure("x", EAGER, EAGER.float(), TRUTH)
