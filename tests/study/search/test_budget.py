"""Budgets as users write them."""

import pytest

from fastskip.study.search.budget import Budget, BudgetError, Quantity, impossible, parse_budget


@pytest.mark.parametrize(
    ("text", "quantity", "share", "most_s"),
    [
        ("tpot 1.5x", Quantity.TPOT, 1 / 1.5, None),
        ("TTFT  80ms", Quantity.TTFT, None, 0.08),
        (" tpot 0.02 s", Quantity.TPOT, None, 0.02),
        ("flops 0.7", Quantity.FLOPS, 0.7, None),
        ("flops 70 %", Quantity.FLOPS, 0.7, None),
        ("flops 2x", Quantity.FLOPS, 0.5, None),
        ("flops .5", Quantity.FLOPS, 0.5, None),
    ],
)
def test_what_can_be_said(
    text: str, quantity: Quantity, share: float | None, most_s: float | None
) -> None:
    found = parse_budget(text)
    assert found.quantity is quantity
    assert found.share == (None if share is None else pytest.approx(share))
    assert found.most_s == (None if most_s is None else pytest.approx(most_s))


@pytest.mark.parametrize(
    "text",
    ["", "1.5x", "memory 0.5", "tpot 1.5", "tpot 0.9x", "ttft 50%", "flops 80ms", "flops 1.2"]
    + ["flops 0", "tpot -1x", "tpot 1.5x ttft 2x", "flops 120%", "ttft 0ms", "flops nan"],
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(BudgetError, match="allowed"):
        parse_budget(text)


def test_limits() -> None:
    assert parse_budget("tpot 2x").limit(None) == 0.5
    assert parse_budget("ttft 80ms").limit(0.1) == pytest.approx(0.8)
    assert parse_budget("ttft 80ms").limit(0.01) == 1.0
    with pytest.raises(BudgetError, match="measured"):
        parse_budget("ttft 80ms").limit(None)
    with pytest.raises(BudgetError, match="one of"):
        Budget(Quantity.TTFT)
    found = parse_budget("tpot 1.5x").to_dict()
    assert found["least"] == pytest.approx(1.5) and found["text"] == "TPOT 1.5x faster"


def test_an_impossible_budget_says_what_is_possible() -> None:
    error = impossible(parse_budget("tpot 9x"), 0.25, 0.02)
    assert "TPOT 4x faster (5 ms; dense takes 20 ms)" in str(error)
    assert "0.25 of the dense FLOPs" in str(impossible(parse_budget("flops 0.1"), 0.25, None))
