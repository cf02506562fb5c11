"""How an answer is judged against the right ones: the metrics of the field, item by item.

- Exact match after lower case, without punctuation and articles.
- VQA soft accuracy (Antol et al., "VQA: Visual Question Answering", 2015; the rules of its
  evaluation: number words as digits, apostrophes of contractions, punctuation between digits kept).
- Yes or no (Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", POPE,
  2023): an answer that says "no" or "not" in its first sentence means no, any other yes.
- F1 of the phrases of a caption.
- CIDEr of a caption (see `fastskip.study.captions`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

from fastskip.study import captions
from fastskip.wording import Scale

LEAST_PEOPLE = 4
"""Answers that VQA accuracy needs: one is compared with the others, of which three are enough."""


class ScaleError(ValueError):
    """Scores that have no mean, as they are counted in different things."""


class Metric(StrEnum):
    """How an answer is judged; but for `VQA`, by the reference that it fits best."""

    EXACT = "exact"
    """1 if the words are the same, else 0; case, punctuation and articles do not count."""
    CAPTION = "caption"
    """F1 of the phrases named, in any order: parted by "and", commas and full stops."""
    VQA = "vqa"
    """The mean, over the people asked, of min(1, how many of the others said the same / 3)."""
    YES_NO = "yes-no"
    """1 if answer and reference both mean yes, or both no."""
    CIDER = "cider"
    """Of captions: how many of their n-grams people use too, the rarer ones counting more; 0 to 10.
    Only items together have it: what is rare, their references say."""

    @property
    def scale(self) -> Scale:
        """What its scores are counted in."""
        return Scale.of(self)

    def score(self, answer: str, references: Sequence[str]) -> float:
        """In [0, 1]: how well the answer fits the references.

        Raises:
            ValueError: under this metric one answer has no score of its own.
        """
        if self is Metric.CIDER:
            raise ValueError("metric: cider; allowed: one that scores answers one by one")
        if self is Metric.VQA:
            return _vqa(answer, references)
        judge = {
            Metric.EXACT: _exact,
            Metric.CAPTION: _phrases_f1,
            Metric.YES_NO: _same_verdict,
        }[self]
        return max(judge(answer, reference) for reference in references)

    def problem(self, references: Sequence[str]) -> str | None:
        """What is wrong with these references for this metric, and what is allowed."""
        if not references or not all(words(each) for each in references):
            return f"answer is {list(references)}; allowed: some words"
        if self is Metric.VQA and len(references) < LEAST_PEOPLE:
            allowed = f"{LEAST_PEOPLE} or more, one a person asked"
            return f"answer has {len(references)} texts under metric vqa; allowed: {allowed}"
        if self is Metric.YES_NO and not {words(each) for each in references} <= {"yes", "no"}:
            return f"answer is {list(references)} under metric yes-no; allowed: yes or no"
        return None


def scale_of(metrics: Iterable[Metric]) -> Scale:
    """What scores under all of these are counted in.

    Raises:
        ScaleError: in different things.
    """
    scales = {metric.scale: metric for metric in metrics}
    if len(scales) > 1:
        allowed = "cider for all items together or for none, since a mean of both says nothing"
        raise ScaleError(f"metric: {' and '.join(scales.values())}; allowed: {allowed}")
    return next(iter(scales), Scale.SHARE)


def score_all(
    metrics: Sequence[Metric], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """The score of each answer, under the metric of each.

    Raises:
        CaptionError: captions are too few, or their scorers are not installed.
    """
    together = [index for index, metric in enumerate(metrics) if metric is Metric.CIDER]
    found = {}
    if together:
        told, true = [answers[n] for n in together], [references[n] for n in together]
        scores = captions.cider(told, true)
        found = dict(zip(together, scores, strict=True))
    return [
        found[index] if index in found else metric.score(answer, own)
        for index, (metric, answer, own) in enumerate(
            zip(metrics, answers, references, strict=True)
        )
    ]


@dataclass(frozen=True, slots=True)
class YesNo:
    """Answers to yes/no questions together; yes is what is looked for (POPE)."""

    accuracy: float
    precision: float
    recall: float
    said_yes: float

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0 without any right yes."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str]) -> YesNo:
        """Of answers and the right ones, in the same order; not empty.

        Raises:
            ValueError: there are none, or not as many of both.
        """
        if not answers or len(answers) != len(references):
            counts = f"{len(answers)}, {len(references)}"
            raise ValueError(f"answers, references: {counts}; allowed: as many of both, not none")
        said, true = list(map(means_yes, answers)), list(map(means_yes, references))
        right = sum(a and b for a, b in zip(said, true, strict=True))
        return cls(
            accuracy=fmean(a == b for a, b in zip(said, true, strict=True)),
            precision=right / sum(said) if any(said) else 0.0,
            recall=right / sum(true) if any(true) else 0.0,
            said_yes=fmean(said),
        )


def words(text: str) -> str:
    """A text in lower case, without punctuation and articles, parted by single spaces."""
    return " ".join(_without_articles(text.lower().translate(_BARE).split()))


def _without_articles(found: list[str]) -> list[str]:
    """But where there is nothing else, an article is what is said, as the letter of a choice."""
    return [word for word in found if word not in _ARTICLES] or found


def means_yes(text: str) -> bool:
    """Whether an answer means yes, as POPE reads it."""
    first = text.lower().partition(".")[0].replace(",", "")
    return not {"no", "not"} & set(first.split())


def vqa_words(text: str) -> str:
    """An answer as VQA compares it."""
    given = text = " ".join(text.lower().split())
    has_number = _COMMA_NUMBER.search(given) is not None
    for mark in _MARKS:
        is_dropped = has_number or f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if is_dropped else " ")
    text = _PERIOD.sub("", text)
    found = _without_articles([_NUMBERS.get(word, word) for word in text.split()])
    return " ".join(_CONTRACTIONS.get(word, word) for word in found)


_ARTICLES = frozenset({"a", "an", "the"})
_BARE = str.maketrans(string.punctuation, " " * len(string.punctuation))
_PARTING = re.compile(r"\band\b|[,.;]")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {name: str(number) for number, name in enumerate(_DIGITS.split())} | {"none": "0"}
_WITH_NOT = (
    "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn "
    "weren won wouldn"
)
_WITH_OTHERS = (
    "could've he's how'd how's i'm i've it'd it'll let's ma'am might've must've o'clock she's "
    "should've somebody's someone's something's that's there's they'd they've they're we've what's "
    "what're what've where'd where's who'd who's who've would've y'all you'd you'll you're you've"
)
_CONTRACTIONS = {f"{word}t": f"{word}'t" for word in _WITH_NOT.split()} | {
    word.replace("'", ""): word for word in _WITH_OTHERS.split()
}


def _vqa(answer: str, references: Sequence[str]) -> float:
    told, said = vqa_words(answer), [vqa_words(each) for each in references]
    same = sum(each == told for each in said)
    return fmean(min(1.0, (same - (each == told)) / 3) for each in said)


def _exact(answer: str, reference: str) -> float:
    return float(words(answer) == words(reference))


def _same_verdict(answer: str, reference: str) -> float:
    return float(means_yes(answer) == means_yes(reference))


def _phrases_f1(answer: str, reference: str) -> float:
    told, true = _phrases(answer), _phrases(reference)
    if not told:
        return 0.0
    return 2 * (told & true).total() / (told.total() + true.total())


def _phrases(text: str) -> Counter[str]:
    return Counter(phrase for part in _PARTING.split(text.lower()) if (phrase := words(part)))
