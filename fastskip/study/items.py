"""Items to judge a model by: a question, mostly about images, and what the right answer is.

A question may come late in a conversation: earlier turns are then its history, with the answers
that were given, not those of the model that is judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.conversations import PLACEHOLDER, DataError, Turn, example_of, image_names
from fastskip.study.json_lines import Format
from fastskip.study.metrics import Metric


class ItemError(ValueError):
    """An item that cannot be used; names it, what is wrong and what is allowed."""


QUESTION, MULTI_TURN = "question", "multi-turn"
"""Kinds of items that name none: without a history, and with one."""
CONVERSATIONS = "conversations"
_FORMAT = Format(
    what="items",
    fields=frozenset({"question", "answer", "image", "kind", "metric", "history"}),
    allowed='one JSON object a line, {"question": "...", "answer": "..." or ["...", ...]}, and, '
    'where wanted, "image": "a.jpg" or ["a.jpg", ...], "history": [{"question": "...", "answer": '
    f'"..."}}, ...], "kind": "...", "metric": {" or ".join(Metric)}; or LLaVA\'s conversations, '
    'a line each or one array, {"image": "a.jpg", "conversations": [{"from": "human", "value": '
    '"<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}',
    error=ItemError,
    free=CONVERSATIONS,
    takes_array=True,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        question: with one ``<image>`` where an image stands, or none: images then come first.
        references: right answers, each by itself.
        images: pictures or their files, of all turns together, in the order of their places.
        kind: what results are parted by.
        metric: how answers are judged.
        where: how errors name it.
        history: earlier turns of the conversation.
    """

    question: str
    references: tuple[str, ...]
    images: tuple[Image | Path, ...] = ()
    kind: str = QUESTION
    metric: Metric = Metric.EXACT
    where: str = "item"
    history: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if not self.question.replace(PLACEHOLDER, "").strip():
            raise ItemError(f"{self.where}: question is {self.question!r}; allowed: some words")
        problem = self.metric.problem(self.references)
        if problem is not None:
            raise ItemError(f"{self.where}: {problem}")
        asked = [*(turn.question for turn in self.history), self.question]
        placed = sum(text.count(PLACEHOLDER) for text in asked)
        if placed not in (0, len(self.images)):
            raise ItemError(
                f"{self.where}: {placed} {PLACEHOLDER} for {len(self.images)} images; allowed: one "
                "for each image, or none (images then come first)"
            )


def read_items(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    metric: Metric = Metric.EXACT,
    most: int | None = None,
    on_broken: Callable[[str], object] | None = None,
) -> list[Item]:
    """The items of a file of JSON lines or of one JSON array.

    Of LLaVA's conversations every answer is an item, with the turns before it as its history.

    Args:
        path: the file.
        images: the folder that image paths start at; by default the file's own.
        metric: of items that name none.
        most: so many items at the most; rows behind them are not looked at.
        on_broken: called with what is wrong with a row that cannot be used; without it, the first
            such row is an error.
    Raises:
        ItemError: the file cannot be used, or a row of it, or none of its rows.
    """
    folder = Path(path).parent if images is None else Path(images)
    if not folder.is_dir():
        raise ItemError(f"images: {folder} is no folder; allowed: an existing folder")
    found: list[Item] = []
    first: ItemError | None = None
    for text, where in _FORMAT.rows(path):
        if most is not None and len(found) >= most:
            break
        try:
            found += _items(_FORMAT.parse(text, where), folder, where, metric)
        except ItemError as error:
            if on_broken is None:
                raise
            first = first or error
            on_broken(str(error))
    if not found:
        raise ItemError(f"{path}: no item that can be used; the first row: {first}") from first
    return found[:most]


def _items(document: dict[str, Any], folder: Path, where: str, metric: Metric) -> list[Item]:
    name = _text(document, "metric", where, metric.value)
    if name not in tuple(Metric):
        raise ItemError(f"{where}: metric is {name!r}; allowed: {', '.join(Metric)}")
    try:
        if CONVERSATIONS in document:
            return _items_of_conversation(document, folder, where, Metric(name))
        images = tuple(folder / each for each in image_names(document, where) if each)
    except DataError as error:
        raise ItemError(str(error)) from error
    history = _history(document.get("history", []), where)
    return [
        Item(
            question=_text(document, "question", where, ""),
            references=_references(document.get("answer"), where),
            images=images,
            kind=_text(document, "kind", where, MULTI_TURN if history else QUESTION),
            metric=Metric(name),
            where=where,
            history=history,
        )
    ]


def _items_of_conversation(
    document: dict[str, Any], folder: Path, where: str, metric: Metric
) -> list[Item]:
    example = example_of(document, folder, where)
    found, placed = [], 0
    are_placed = any(PLACEHOLDER in turn.question for turn in example.turns)
    for number, turn in enumerate(example.turns):
        placed += turn.question.count(PLACEHOLDER)
        found.append(
            Item(
                question=turn.question,
                references=(turn.answer,),
                # images of later turns have not been shown yet
                images=example.images[:placed] if are_placed else example.images,
                kind=_text(document, "kind", where, MULTI_TURN if number else QUESTION),
                metric=metric,
                where=f"{where}, answer {number + 1}",
                history=example.turns[:number],
            )
        )
    return found


def _references(answer: Any, where: str) -> tuple[str, ...]:
    references = [answer] if isinstance(answer, str) else answer
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise ItemError(f"{where}: answer is {answer!r}; allowed: a text, or a list of texts")
    return tuple(references)


def _history(turns: Any, where: str) -> tuple[Turn, ...]:
    allowed = 'a list of {"question": "...", "answer": "..."}'
    if not isinstance(turns, list):
        raise ItemError(f"{where}: history is {turns!r}; allowed: {allowed}")
    for number, turn in enumerate(turns):
        is_turn = isinstance(turn, dict) and turn.keys() == {"question", "answer"}
        if not is_turn or not all(isinstance(text, str) and text.strip() for text in turn.values()):
            raise ItemError(f"{where}: history[{number}] is {turn!r}; allowed: {allowed}")
    return tuple(Turn(turn["question"], turn["answer"]) for turn in turns)


def _text(document: Mapping[str, Any], name: str, where: str, default: str) -> str:
    value = document.get(name, default)
    if not isinstance(value, str):
        raise ItemError(f"{where}: {name} is {value!r}; allowed: a text")
    return value
