"""Items to evaluate a model on: a question, usually about images, and its right answers.

A question may come late in a conversation: the earlier turns are then its history, with the answers
recorded in the file rather than those of the model being judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.prompts.conversations import PLACEHOLDER, DataError, Turn, example_of, image_names
from fastskip.study.evaluation.metrics import Metric
from fastskip.study.json_lines import Format


class ItemError(ValueError):
    """An item cannot be used; names it, what is wrong and what is allowed."""


QUESTION, MULTI_TURN = "question", "multi-turn"
"""Default kinds of items: without a history, and with one."""
CONVERSATIONS = "conversations"
_FORMAT = Format(
    what="items",
    fields=frozenset({"question", "answer", "image", "kind", "metric", "history"}),
    allowed='one JSON object per line, {"question": "...", "answer": "..." or ["...", ...]}, with '
    'optional "image": "a.jpg" or ["a.jpg", ...], "history": [{"question": "...", "answer": '
    f'"..."}}, ...], "kind": "...", "metric": {" or ".join(Metric)}; or LLaVA conversations, '
    'one per line or as one array, {"image": "a.jpg", "conversations": [{"from": "human", "value": '
    '"<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}',
    error=ItemError,
    free=CONVERSATIONS,
    takes_array=True,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        question: with one ``<image>`` per image where it belongs, or none: images then come first.
        references: right answers; each is sufficient by itself.
        images: images or their files, of all turns together, in order of appearance.
        kind: what results are grouped by.
        metric: how answers are scored.
        where: how error messages name the item.
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
    """Read the items of a JSON Lines file, or of a file that holds one JSON array.

    Every answer of a LLaVA conversation is an item, with the turns before it as its history.

    Args:
        path: the file.
        images: the folder that image paths are relative to; by default the file's own.
        metric: the metric of items that name none.
        most: maximum number of items; later rows are not read.
        on_broken: called with a message for each row that cannot be used; without it, the first
            such row raises.
    Raises:
        ItemError: the file or a row of it cannot be used, or no row can; or `most` is too small.
    """
    folder = Path(path).parent if images is None else Path(images)
    if not folder.is_dir():
        raise ItemError(f"images: {folder} is not a folder; allowed: an existing folder")
    if most is not None and most < 1:
        raise ItemError(f"most: {most}; allowed: 1 or more, or none")
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
        raise ItemError(f"{path}: no usable item; first problem: {first}") from first
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
        raise ItemError(f"{where}: answer is {answer!r}; allowed: a string or a list of strings")
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
        raise ItemError(f"{where}: {name} is {value!r}; allowed: a string")
    return value
