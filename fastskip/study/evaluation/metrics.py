"""Score answers against references with the field's standard metrics, item by item.

- Exact match, ignoring case, punctuation and articles.
- VQA soft accuracy (Antol et al., "VQA: Visual Question Answering", 2015; normalised as in its
  official evaluation: number words become digits, contractions regain their apostrophes, a full
  stop before a digit is kept).
- Yes or no (Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", POPE,
  2023): an answer with "no" or "not" in its first sentence means no, any other means yes.
- F1 over the phrases of a caption.
- CIDEr of a caption (see `fastskip.study.evaluation.captions`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

from fastskip.study.evaluation import captions
from fastskip.wording import Scale, counted

LEAST_PEOPLE = 4
"""Fewest human answers for VQA accuracy: with one left out, three must remain for a full score."""


class ScaleError(ValueError):
    """Scores on different scales, which cannot be averaged."""


class Metric(StrEnum):
    """How an answer is scored: by its best-matching reference, except under `VQA` and `CIDER`."""

    EXACT = "exact"
    """1 if the words are the same, else 0; case, punctuation and articles are ignored."""
    CAPTION = "caption"
    """F1 over phrases, in any order; "and", commas, semicolons and full stops separate phrases."""
    VQA = "vqa"
    """Mean over the human answers of min(1, matches among the others / 3)."""
    YES_NO = "yes-no"
    """1 if answer and reference both mean yes or both mean no, else 0."""
    CIDER = "cider"
    """TF-IDF-weighted n-gram similarity to human captions, 0 to 10. Defined only over a set of
    items, since their references determine the IDF weights."""

    @property
    def scale(self) -> Scale:
        """The scale of its scores."""
        return Scale.of(self)

    def score(self, answer: str, references: Sequence[str]) -> float:
        """How well the answer matches the references, in [0, 1].

        Raises:
            ValueError: the metric is CIDEr, which does not score answers one by one.
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
        """Why these references cannot be used with this metric; `None` if they can."""
        if not references or not all(words(each) for each in references):
            return f"answer is {list(references)}; allowed: some words"
        if self is Metric.VQA and len(references) < LEAST_PEOPLE:
            allowed = f"{LEAST_PEOPLE} or more, one per human annotator"
            found = counted(len(references), "string")
            return f"answer has {found} under metric vqa; allowed: {allowed}"
        if self is Metric.YES_NO and not {words(each) for each in references} <= {"yes", "no"}:
            return f"answer is {list(references)} under metric yes-no; allowed: yes or no"
        return None


def scale_of(metrics: Iterable[Metric]) -> Scale:
    """The scale that all of these metrics share.

    Raises:
        ScaleError: they have different scales.
    """
    scales = {metric.scale: metric for metric in metrics}
    if len(scales) > 1:
        allowed = "cider for all items together or for none: a mean over both is meaningless"
        raise ScaleError(f"metric: {' and '.join(scales.values())}; allowed: {allowed}")
    return next(iter(scales), Scale.SHARE)


def score_all(
    metrics: Sequence[Metric], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """The score of each answer under its own metric.

    Raises:
        CaptionError: there are too few captions, or their scorers are not installed.
    """
    together = [index for index, metric in enumerate(metrics) if metric is Metric.CIDER]
    found = {}
    if together:
        scores = captions.cider([answers[n] for n in together], [references[n] for n in together])
        found = dict(zip(together, scores, strict=True))
    return [
        found[index] if index in found else metric.score(answer, own)
        for index, (metric, answer, own) in enumerate(
            zip(metrics, answers, references, strict=True)
        )
    ]


@dataclass(frozen=True, slots=True)
class YesNo:
    """Scores over all yes/no questions; yes is the positive class (POPE)."""

    accuracy: float
    precision: float
    recall: float
    said_yes: float

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0 without any true positive."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str]) -> YesNo:
        """Score answers against references in the same order.

        Raises:
            ValueError: there are none, or the two differ in number.
        """
        if not answers or len(answers) != len(references):
            counts = f"{len(answers)}, {len(references)}"
            allowed = "equally many of both, at least one"
            raise ValueError(f"answers, references: {counts}; allowed: {allowed}")
        said, true = list(map(means_yes, answers)), list(map(means_yes, references))
        right = sum(a and b for a, b in zip(said, true, strict=True))
        return cls(
            accuracy=fmean(a == b for a, b in zip(said, true, strict=True)),
            precision=right / sum(said) if any(said) else 0.0,
            recall=right / sum(true) if any(true) else 0.0,
            said_yes=fmean(said),
        )


def words(text: str) -> str:
    """A text in lower case, without punctuation and articles, separated by single spaces."""
    return " ".join(_without_articles(text.lower().translate(_BARE).split()))


def _without_articles(found: list[str]) -> list[str]:
    """Unless nothing else is left: the answer may be a letter of a multiple-choice question."""
    return [word for word in found if word not in _ARTICLES] or found


def means_yes(text: str) -> bool:
    """Whether an answer means yes, by POPE's rule."""
    first = text.lower().partition(".")[0].replace(",", "")
    return not {"no", "not"} & set(first.split())


def vqa_words(text: str) -> str:
    """An answer normalised as VQA's official evaluation does."""
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
_SEPARATOR = re.compile(r"\band\b|[,.;]")
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
    own, human = vqa_words(answer), [vqa_words(each) for each in references]
    same = sum(each == own for each in human)
    return fmean(min(1.0, (same - (each == own)) / 3) for each in human)


def _exact(answer: str, reference: str) -> float:
    return float(words(answer) == words(reference))


def _same_verdict(answer: str, reference: str) -> float:
    return float(means_yes(answer) == means_yes(reference))


def _phrases_f1(answer: str, reference: str) -> float:
    own, true = _phrases(answer), _phrases(reference)
    if not own:
        return 0.0
    return 2 * (own & true).total() / (own.total() + true.total())


def _phrases(text: str) -> Counter[str]:
    return Counter(phrase for part in _SEPARATOR.split(text.lower()) if (phrase := words(part)))
