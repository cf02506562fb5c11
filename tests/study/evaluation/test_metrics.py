"""Metrics against worked examples of the rules that their papers and evaluations state."""

import json
import math
import sys

import pytest

from fastskip.intervals import Estimate
from fastskip.study.evaluation.answers import Evaluation, Judged
from fastskip.study.evaluation.captions import CaptionError, CaptionScores, cider, tokens
from fastskip.study.evaluation.items import Item, ItemError
from fastskip.study.evaluation.metrics import (
    Metric,
    ScaleError,
    YesNo,
    means_yes,
    scale_of,
    score_all,
    vqa_words,
)
from fastskip.wording import Scale


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
    with pytest.raises(ValueError, match="at least one"):
        YesNo.of([], [])


@pytest.mark.parametrize(
    ("metric", "references", "problem"),
    [
        (Metric.VQA, ("red",) * 3, "3 strings under metric vqa; allowed: 4 or more"),
        (Metric.YES_NO, ("maybe",), "allowed: yes or no"),
        (Metric.EXACT, (" - ",), "allowed: some words"),
        (Metric.EXACT, (), "allowed: some words"),
    ],
)
def test_references_that_do_not_fit(
    metric: Metric, references: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ItemError, match=problem):
        Item("what?", references, metric=metric)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man\u2019s dog, running.", "a man 's dog running"),
        ("It DOESN'T cost 3.50!", "it does n't cost 3.50"),
        ("two red-brown cats (asleep)", "two red-brown cats asleep"),
        ("...", ""),
    ],
)
def test_words_of_captions(text: str, expected: str) -> None:
    assert " ".join(tokens(text)) == expected


def test_cider_by_hand() -> None:
    """Two items, so that an n-gram of one item weighs log 2 and one of both weighs nothing."""
    references = [["A red dog."], ["a cat sleeps"]]
    # "a" is of both items. Of the first answer: red and dog match, of its pairs "red dog" does not
    # ("red big"); the mean over four lengths, of which only 1-grams and 2-grams have something.
    # 1-grams: answer (red, big, dog), reference (red, dog): 2 / (sqrt 3 * sqrt 2).
    # 2-grams: answer (a red, red big, big dog), reference (a red, red dog): 1 / (sqrt 3 * sqrt 2).
    # 3-grams: (a red big, red big dog) and (a red dog): 0. One pair more: exp(-1 / 72).
    first = 10 / 4 * (2 + 1) / math.sqrt(6) * math.exp(-1 / 72)
    # word by word the same: 1 for each length that the text has, 3 of 4
    second = 10 / 4 * 3
    found = cider(["a red, big dog", "A cat sleeps!"], references)
    assert found == pytest.approx([first, second])
    assert cider(["", "a"], references) == [0.0, 0.0]
    # With two references, their mean; words of both items are weighed the same.
    both = cider(["a red dog", "a cat sleeps"], [["a red dog", "it is"], ["a cat sleeps"]])
    assert both == pytest.approx([second / 2, second])


def test_captions_together() -> None:
    answers, references = ["a red dog", "a cat"], [["a red dog"], ["a cat sleeps", "cats"]]
    found = CaptionScores.of(answers, references)
    assert found.cider == pytest.approx(sum(cider(answers, references)) / 2)
    # 5 of 5 words, 3 of 3 pairs; the nearest length of the second is 3 or 1, of which 1 is shorter
    assert found.bleu[:2] == pytest.approx((1.0, 1.0))
    # recall 2/3, precision 1, beta 1.2
    second = (1 + 1.44) * (2 / 3) / (2 / 3 + 1.44)
    assert found.rouge_l == pytest.approx((1 + second) / 2)


def test_metrics_are_mixed() -> None:
    metrics = [Metric.CIDER, Metric.EXACT, Metric.CIDER]
    answers, references = ["a red dog", "No", "a cow"], [["a red dog"], ["no"], ["a cat sleeps"]]
    found = score_all(metrics, answers, references)
    assert found[1] == 1 and [found[0], found[2]] == cider(
        [answers[0], answers[2]], [references[0], references[2]]
    )
    with pytest.raises(ValueError, match="one by one"):
        Metric.CIDER.score("a", ["a"])


def test_scores_of_two_scales_have_no_mean() -> None:
    assert scale_of([Metric.EXACT, Metric.VQA, Metric.YES_NO]) is Scale.SHARE
    assert scale_of([Metric.CIDER] * 2) is Scale.CIDER
    with pytest.raises(ScaleError, match="metric: exact and cider; allowed: cider for all items"):
        scale_of([Metric.EXACT, Metric.CIDER])

    def judged(metric: Metric, score: float) -> Judged:
        return Judged("question", "what?", ("a",), metric, "b", score)

    shares = tuple(judged(Metric.EXACT, score) for score in (1.0, 1.0, 0.0))
    captions = tuple(judged(Metric.CIDER, score) for score in (0.0, 0.0, 2.5))
    mixed = Evaluation((*captions, *shares))
    assert mixed.parts == {Scale.SHARE: Evaluation(shares), Scale.CIDER: Evaluation(captions)}
    assert Evaluation.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    for refused in (mixed.mean, mixed.estimate, lambda: mixed.minus(mixed)):
        with pytest.raises(ScaleError):
            refused()
    # CIDEr that is 0 throughout is no share of right answers.
    assert Evaluation(captions[:2]).estimate() == Estimate(0.0, 0.0, 0.0)
    assert Evaluation(shares[2:]).estimate().high > 0.5


def test_captions_that_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptionError, match="1 item; allowed: 2 or more"):
        cider(["a"], [["a"]])
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(CaptionError, match=r"pip install 'fastskip\[captions\]'"):
        cider(["a", "b"], [["a"], ["b"]])


@pytest.mark.parametrize("metric", [Metric.EXACT, Metric.CAPTION, Metric.VQA])
def test_the_letter_a_is_an_answer(metric: Metric) -> None:
    """Of choices: an article only where there are other words."""
    references = ["A"] * 10
    assert metric.problem(references) is None
    scores = [metric.score(answer, references) for answer in ("A", "a.", "B", "")]
    assert scores == [1, 1, 0, 0]
    assert metric.score("the cat", ["a cat"] * 10) == 1
