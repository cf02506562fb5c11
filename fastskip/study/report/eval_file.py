"""Read and validate `eval.json`: items with their images, and each policy's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from fastskip.intervals import Estimate, mean_difference, mean_score
from fastskip.study.report.circumstances import Circumstances, read_circumstances
from fastskip.study.report.fields import MOST, Field, read_document
from fastskip.wording import Scale, counted


@dataclass(frozen=True, slots=True)
class AskedItem:
    """One question; `images`: thumbnails, checked to exist; `history`: earlier questions and
    answers."""

    question: str
    references: tuple[str, ...]
    kind: str
    metric: str
    images: tuple[Path, ...]
    history: tuple[tuple[str, str], ...]

    @property
    def scale(self) -> Scale:
        """The scale of its score."""
        return Scale.of(self.metric)


@dataclass(frozen=True, slots=True)
class Answer:
    """A policy's answer to one item, and its score: in [0, 1], or in [0, 10] under CIDEr."""

    text: str
    score: float
    scale: Scale


@dataclass(frozen=True)
class JudgedPolicy:
    """One policy's answers, in the order of the items.

    `agreed`, `diverged`: agreement with dense per item (token share; KL in nats). `flops`: on the
    first item. `ttft_s`, `tpot_s`: medians in seconds, `None` if no times were taken.
    """

    label: str
    policy: Mapping[str, Any]
    answers: tuple[Answer, ...]
    agreed: tuple[float, ...]
    diverged: tuple[float, ...]
    flops: float
    ttft_s: float | None
    tpot_s: float | None

    @property
    def tokens(self) -> float:
        """Mean token agreement with dense."""
        return fmean(self.agreed)

    @property
    def divergence(self) -> float:
        """Mean divergence from dense, in nats."""
        return fmean(self.diverged)

    @cached_property
    def score(self) -> Estimate:
        """The mean score with its 95 % interval over items (`intervals.mean_score`)."""
        return mean_score(self._scores, is_share=self._is_share)

    def minus(self, dense: JudgedPolicy) -> Estimate:
        """How much better than dense, item by item (`intervals.mean_difference`). Dense minus
        itself is exactly 0."""
        if dense is self:
            return Estimate(0.0, 0.0, 0.0)
        return mean_difference(dense._scores, self._scores, is_share=self._is_share)

    @property
    def _scores(self) -> list[float]:
        return [each.score for each in self.answers]

    @property
    def _is_share(self) -> bool:
        (scale,) = {each.scale for each in self.answers}
        return scale is Scale.SHARE


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One run of `fastskip eval`; the dense model comes first.

    Scores of one run may be on different scales, which cannot be averaged: whatever shows scores
    takes one of the `parts`.
    """

    source: str
    circumstances: Circumstances
    new_tokens: int
    items: tuple[AskedItem, ...]
    judged: tuple[JudgedPolicy, ...]

    @property
    def parts(self) -> tuple[EvalResult, ...]:
        """The run split by the scale of its scores."""
        places: dict[Scale, list[int]] = {}
        for number, item in enumerate(self.items):
            places.setdefault(item.scale, []).append(number)
        return tuple(self._of(places[scale]) for scale in Scale if scale in places)

    @property
    def scale(self) -> Scale:
        """The scale of a part's scores."""
        return self.items[0].scale

    def _of(self, places: Sequence[int]) -> EvalResult:
        return replace(
            self,
            items=tuple(self.items[place] for place in places),
            judged=tuple(
                replace(
                    each,
                    answers=tuple(each.answers[place] for place in places),
                    agreed=tuple(each.agreed[place] for place in places),
                    diverged=tuple(each.diverged[place] for place in places),
                )
                for each in self.judged
            ),
        )

    @property
    def dense(self) -> JudgedPolicy:
        """The dense model, the baseline of the others."""
        return self.judged[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items, in order of first appearance."""
        return tuple(dict.fromkeys(item.kind for item in self.items))


def read_eval(folder: Path) -> EvalResult:
    """Read the result in a folder.

    Raises:
        ReportError: `eval.json`, or an image that it names, cannot be used.
    """
    document = read_document(folder / "eval.json", "eval")
    items = tuple(_item(each, folder) for each in document.get("items").each())
    if not items:
        document.get("items").refuse("at least one item")
    judgements = document.get("judgements")
    judged = tuple(_judged(each, items) for each in judgements.each())
    if not judged:
        judgements.refuse("the dense model's judgement, then each policy's")
    return EvalResult(
        source=str(folder),
        circumstances=read_circumstances(document),
        new_tokens=document.get("new_tokens").count(1),
        items=items,
        judged=judged,
    )


def _item(field: Field, folder: Path) -> AskedItem:
    first, every, history = field.may("image"), field.may("images"), field.may("history")
    images = list(every.each()) if every is not None else [] if first is None else [first]
    return AskedItem(
        question=field.get("question").text(),
        references=tuple(each.text() for each in field.get("references").each()),
        kind=field.get("kind").text(),
        metric=field.get("metric").text(),
        images=tuple(_image(each, folder) for each in images),
        history=tuple(
            (each.get("question").text(), each.get("answer").text())
            for each in ([] if history is None else history.each())
        ),
    )


def _image(field: Field, folder: Path) -> Path:
    name = Path(field.text())
    # a file from elsewhere must not pull other local files into a page that gets shared
    if name.is_absolute() or ".." in name.parts:
        field.refuse("a path within the folder")
    path = folder / name
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        field.refuse("an image file in the folder", f"no image {field.value!r} there")
    return path


def _judged(field: Field, items: tuple[AskedItem, ...]) -> JudgedPolicy:
    label = field.get("label").text()
    judged = field.get("evaluation").get("judged")
    answers: list[Answer] = []
    for each in judged.each():
        number = len(answers)
        asked = each.get("question")
        if number < len(items) and asked.text() != items[number].question:
            asked.refuse(f"{items[number].question!r}, as in items[{number}]")
        scale = items[number].scale if number < len(items) else Scale.SHARE
        score = each.get("score").number(0, 1 if scale is Scale.SHARE else 10)
        answers.append(Answer(each.get("answer").text(), score, scale))
    if len(answers) != len(items):
        judged.refuse(f"one answer per item, {len(items)}", counted(len(answers), "answer"))
    agreement, speed = field.get("agreement"), field.may("speed")
    return JudgedPolicy(
        label=label,
        policy=field.get("policy").object(),
        answers=tuple(answers),
        agreed=_each(agreement.get("tokens"), len(items), 1),
        diverged=_each(agreement.get("divergence"), len(items)),
        flops=field.get("flops").number(0),
        ttft_s=None if speed is None else speed.get("ttft_s").number(0),
        tpot_s=None if speed is None else speed.get("tpot_s").number(0),
    )


def _each(field: Field, count: int, most: float = MOST) -> tuple[float, ...]:
    values = tuple(each.number(0, most) for each in field.each())
    if len(values) != count:
        field.refuse(f"one number per item, {count}", counted(len(values), "number"))
    return values
