"""Items to judge a model by: a question, mostly about an image, and what the right answer is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.study.json_lines import Format
from fastskip.study.metrics import Metric


class ItemError(ValueError):
    """An item that cannot be used; names it, what is wrong and what is allowed."""


_FORMAT = Format(
    what="items",
    fields=frozenset({"question", "answer", "image", "kind", "metric"}),
    allowed='one JSON object a line, {"question": "...", "answer": "..." or ["...", ...]}, and, '
    'where wanted, "image": "a.jpg", "kind": "...", '
    '"metric": "exact", "caption", "vqa" or "yes-no"',
    error=ItemError,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `kind`: what results are parted by; `image`: a picture, or its file."""

    question: str
    references: tuple[str, ...]
    image: Image | Path | None = None
    kind: str = "question"
    metric: Metric = Metric.EXACT
    where: str = "item"

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ItemError(f"{self.where}: question is {self.question!r}; allowed: some words")
        problem = self.metric.problem(self.references)
        if problem is not None:
            raise ItemError(f"{self.where}: {problem}")


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """The items of a file of JSON lines; image paths are seen from the file's folder.

    Raises:
        ItemError: the file or a line of it cannot be used.
    """
    return [_item(document, Path(path).parent, where) for document, where in _FORMAT.read(path)]


def _item(document: dict[str, Any], folder: Path, where: str) -> Item:
    answer = document.get("answer")
    references = [answer] if isinstance(answer, str) else answer
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise ItemError(f"{where}: answer is {answer!r}; allowed: a text, or a list of texts")
    metric = _text(document, "metric", where, Metric.EXACT.value)
    if metric not in tuple(Metric):
        raise ItemError(f"{where}: metric is {metric!r}; allowed: {', '.join(Metric)}")
    image = _text(document, "image", where, "")
    return Item(
        question=_text(document, "question", where, ""),
        references=tuple(references),
        image=folder / image if image else None,
        kind=_text(document, "kind", where, "question"),
        metric=Metric(metric),
        where=where,
    )


def _text(document: Mapping[str, Any], name: str, where: str, default: str) -> str:
    value = document.get(name, default)
    if not isinstance(value, str):
        raise ItemError(f"{where}: {name} is {value!r}; allowed: a text")
    return value
