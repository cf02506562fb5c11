"""Metrics against worked examples of the rules that their papers and evaluations state."""

import pytest

from fastskip.study.items import Item, ItemError
from fastskip.study.metrics import Metric, YesNo, means_yes, vqa_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("The cat, and a dog.", "cat and dog"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes!", "yes "),
        ("  New\n York ", "new york"),
        ("wont", "won't"),
        ("youre", "you're"),
    ],
)
def test_answers_as_vqa_compares_them(text: str, expected: str) -> None:
    assert vqa_words(text) == expected.strip()


@pytest.mark.parametrize(
    ("answer", "said", "score"),
    [
        # Each of ten people is left out in turn.
        ("red", ["red"] * 10, 1.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7) / 10),
        ("red", ["red"] * 2 + ["blue"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("red", ["red"] + ["blue"] * 9, 9 * (1 / 3) / 10),
        ("red", ["blue"] * 10, 0.0),
        ("A RED.", ["the red"] * 10, 1.0),
        ("two", ["2"] * 4, 1.0),
    ],
)
def test_vqa_accuracy(answer: str, said: list[str], score: float) -> None:
    assert Metric.VQA.score(answer, said) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is no dog.", False),
        ("There is not a dog in it", False),
        ("There is a dog. It does not bark.", True),
        ("Nothing", True),
        ("no", False),
    ],
)
def test_what_means_yes(answer: str, is_yes: bool) -> None:
    assert means_yes(answer) is is_yes
    assert Metric.YES_NO.score(answer, ["yes"]) == float(is_yes)


def test_yes_and_no_together() -> None:
    found = YesNo.of(["yes", "yes", "no", "no", "yes"], ["yes", "no", "yes", "no", "yes"])
    assert (found.accuracy, found.said_yes) == (3 / 5, 3 / 5)
    assert (found.precision, found.recall) == (2 / 3, 2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    never = YesNo.of(["no"], ["yes"])
    assert (never.precision, never.recall, never.f1) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="not none"):
        YesNo.of([], [])


@pytest.mark.parametrize(
    ("metric", "references", "problem"),
    [
        (Metric.VQA, ("red",) * 3, "3 texts under metric vqa; allowed: 4 or more"),
        (Metric.YES_NO, ("maybe",), "allowed: yes or no"),
        (Metric.EXACT, ("the",), "allowed: some words"),
        (Metric.EXACT, (), "allowed: some words"),
    ],
)
def test_references_that_do_not_fit(
    metric: Metric, references: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ItemError, match=problem):
        Item("what?", references, metric=metric)
