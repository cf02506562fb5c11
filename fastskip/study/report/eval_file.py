"""Reads `eval.json`: items with their images, and what each policy answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastskip.intervals import Estimate, bootstrap, paired_bootstrap, wilson
from fastskip.study.report.circumstances import Circumstances, read_circumstances
from fastskip.study.report.fields import Field, read_document


@dataclass(frozen=True, slots=True)
class AskedItem:
    """One question; `images`: small copies of its pictures, which are there; `history`: questions
    and answers before it."""

    question: str
    references: tuple[str, ...]
    kind: str
    metric: str
    images: tuple[Path, ...]
    history: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a policy answered to one item, and its score: in [0, 1], under CIDEr in [0, 10]."""

    text: str
    score: float


@dataclass(frozen=True)
class JudgedPolicy:
    """One policy's answers, in the order of the items.

    `tokens`, `divergence`: means of the agreement with dense (share; nats). `flops`: of the first
    item. `ttft_s`, `tpot_s`: medians in seconds, `None` where times were not taken.
    """

    label: str
    policy: Mapping[str, Any]
    answers: tuple[Answer, ...]
    tokens: float
    divergence: float
    flops: float
    ttft_s: float | None
    tpot_s: float | None

    @cached_property
    def score(self) -> Estimate:
        """The mean score with its 95 % interval over items: Wilson's where all are right or wrong,
        which holds for few items and near 1 too, else that of the bootstrap."""
        scores = [each.score for each in self.answers]
        if set(scores) <= {0.0, 1.0}:
            return wilson(sum(scores), len(scores))
        return bootstrap(scores)

    def minus(self, dense: JudgedPolicy) -> Estimate:
        """How much better than dense, item by item."""
        theirs, own = ([each.score for each in one.answers] for one in (dense, self))
        return paired_bootstrap(theirs, own)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One run of `fastskip eval`; the dense model comes first."""

    source: str
    circumstances: Circumstances
    new_tokens: int
    items: tuple[AskedItem, ...]
    judged: tuple[JudgedPolicy, ...]

    @property
    def dense(self) -> JudgedPolicy:
        """What the others are held to."""
        return self.judged[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items, in the order in which they first come."""
        return tuple(dict.fromkeys(item.kind for item in self.items))


def read_eval(folder: Path) -> EvalResult:
    """The result in a folder.

    Raises:
        ReportError: `eval.json`, or an image that it names, cannot be used.
    """
    document = read_document(folder / "eval.json", "eval")
    items = tuple(_item(each, folder) for each in document.get("items").each())
    if not items:
        document.get("items").refuse("one item or more")
    judgements = document.get("judgements")
    judged = tuple(_judged(each, items) for each in judgements.each())
    if not judged:
        judgements.refuse("the dense model's, then each policy's")
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
    # a foreign file must not take others of this machine into a page that is handed on
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
        answers.append(Answer(each.get("answer").text(), each.get("score").number(0, 10)))
    if len(answers) != len(items):
        judged.refuse(f"one answer an item, {len(items)}", f"{len(answers)} answers")
    agreement, speed = field.get("agreement"), field.may("speed")
    return JudgedPolicy(
        label=label,
        policy=field.get("policy").object(),
        answers=tuple(answers),
        tokens=_mean(agreement.get("tokens"), 1),
        divergence=_mean(agreement.get("divergence")),
        flops=field.get("flops").number(0),
        ttft_s=None if speed is None else speed.get("ttft_s").number(0),
        tpot_s=None if speed is None else speed.get("tpot_s").number(0),
    )


def _mean(field: Field, most: float = float("inf")) -> float:
    values = [each.number(0, most) for each in field.each()]
    if not values:
        field.refuse("one number an item")
    return sum(values) / len(values)
