"""Items to judge a model by: a question, mostly about an image, and what the right answer is."""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.study.json_lines import Format


class ItemError(ValueError):
    """An item that cannot be used; names it, what is wrong and what is allowed."""


_FORMAT = Format(
    what="items",
    fields=frozenset({"question", "answer", "image", "kind", "metric"}),
    allowed='one JSON object a line, {"question": "...", "answer": "..." or ["...", ...]}, and, '
    'where wanted, "image": "a.jpg", "kind": "...", "metric": "exact" or "caption"',
    error=ItemError,
)


class Metric(StrEnum):
    """How an answer is judged; in each case by the reference that it fits best."""

    EXACT = "exact"
    """1 if the words are the same, else 0; case, punctuation and articles do not count."""
    CAPTION = "caption"
    """F1 of the phrases named, in any order: parted by "and", commas and full stops."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        """In [0, 1]: how well the answer fits the best of the references."""
        judge = _exact if self is Metric.EXACT else _phrases_f1
        return max(judge(answer, reference) for reference in references)


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
        if not self.references or not all(words(each) for each in self.references):
            raise ItemError(f"{self.where}: answer is {self.references}; allowed: some words")


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """The items of a file of JSON lines; image paths are seen from the file's folder.

    Raises:
        ItemError: the file or a line of it cannot be used.
    """
    return [_item(document, Path(path).parent, where) for document, where in _FORMAT.read(path)]


def words(text: str) -> str:
    """A text in lower case, without punctuation and articles, parted by single spaces."""
    bare = text.lower().translate(_BARE)
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))


_BARE = str.maketrans(string.punctuation, " " * len(string.punctuation))
_PARTING = re.compile(r"\band\b|[,.;]")


def _exact(answer: str, reference: str) -> float:
    return float(words(answer) == words(reference))


def _phrases_f1(answer: str, reference: str) -> float:
    told, true = _phrases(answer), _phrases(reference)
    if not told:
        return 0.0
    return 2 * (told & true).total() / (told.total() + true.total())


def _phrases(text: str) -> Counter[str]:
    return Counter(phrase for part in _PARTING.split(text.lower()) if (phrase := words(part)))


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
