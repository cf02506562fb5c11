"""Conversations about images, as objects or in LLaVA's JSON format: for training or judging.

A row is ``{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value":
"<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}``: one or more turns, with one
image, a list of images, or none.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL.Image import Image

from fastskip.prompts.images import is_url

_ALLOWED = (
    '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, '
    '{"from": "gpt", "value": "A cat."}]}, where image is optional and may be a list'
)
PLACEHOLDER = "<image>"
_BEGINNING = 64
"""How many bytes of a file tell whether it holds an array."""


class DataError(ValueError):
    """An unusable example; names file and line, what is wrong and what is allowed."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, with one ``<image>`` in place of each image, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation and its images (open ones, or files), in the order of their placeholders.

    Without placeholders, images come first. `where`: how errors name the example.
    """

    turns: tuple[Turn, ...]
    images: tuple[Image | Path, ...] = ()
    where: str = "example"

    def __post_init__(self) -> None:
        if not self.turns:
            raise DataError(f"{self.where}: no turns; allowed: one or more")
        for number, turn in enumerate(self.turns, start=1):
            for name, text in (("question", turn.question), ("answer", turn.answer)):
                if not isinstance(text, str) or not text.replace(PLACEHOLDER, "").strip():
                    allowed = "non-empty text"
                    raise DataError(
                        f"{self.where}: {name} {number} is {text!r}; allowed: {allowed}"
                    )
            if PLACEHOLDER in turn.answer:
                raise DataError(
                    f"{self.where}: answer {number} contains {PLACEHOLDER}; allowed: images in "
                    "questions only"
                )
        placed = sum(turn.question.count(PLACEHOLDER) for turn in self.turns)
        if placed not in (0, len(self.images)):
            raise DataError(
                f"{self.where}: {placed} {PLACEHOLDER} for {len(self.images)} images; allowed: one "
                "per image, or none (images then come first)"
            )


class JsonLines(Sequence[Example]):
    """The rows of a JSON Lines file, or of a file that holds one JSON array.

    The file is scanned once to check every row. Lines are read again on access, so that only their
    offsets are kept in memory; an array is kept whole.

    Attributes:
        broken: what is wrong with the rows that were left out.
        fingerprint: equal for equal rows in the same order, wherever file and images are stored.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        *,
        skip_broken: bool = False,
    ) -> None:
        """``images``: the folder that image paths are relative to; by default the file's own.

        Raises:
            DataError: the file cannot be read, a row is unusable and ``skip_broken`` is not set, or
                no row is usable.
        """
        self._path = Path(path)
        self._images = self._path.parent if images is None else Path(images)
        self._offsets, self._numbers = array("q"), array("q")
        self.broken: list[str] = []
        if not self._images.is_dir():
            raise DataError(f"images: {self._images} is not a folder; allowed: an existing folder")
        try:
            with self._path.open("rb") as file:
                self._array = self._read_array(file)
                self._scan(file if self._array is None else self._array, skip_broken)
        except OSError as error:
            raise DataError(f"{self._path}: {error}; allowed: a JSON Lines file") from error
        if not self._offsets:
            reason = f"; the first one: {self.broken[0]}" if self.broken else ""
            raise DataError(f"{self._path}: no usable row{reason}; allowed: {_ALLOWED}")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = self._numbers[index]
        if self._array is not None:
            return self._example(self._array[number - 1], number)
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._example(file.readline(), number)

    def _read_array(self, file: BinaryIO) -> list[bytes] | None:
        """The entries of an array, as lines would hold them; ``None`` if the file is none."""
        is_array = file.read(_BEGINNING).lstrip()[:1] == b"["
        file.seek(0)
        if not is_array:
            return None
        try:
            return [json.dumps(entry).encode() for entry in json.load(file)]
        except (ValueError, RecursionError) as error:
            allowed = f"one array, or one object a line: {_ALLOWED}"
            raise DataError(f"{self._path}: not JSON ({error}); allowed: {allowed}") from error

    def _scan(self, lines: Iterable[bytes], skip_broken: bool) -> None:
        offset, seen = 0, hashlib.sha256()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    self._check_files(self._example(line, number))
                except DataError as error:
                    if not skip_broken:
                        raise
                    self.broken.append(str(error))
                else:
                    self._offsets.append(offset)
                    self._numbers.append(number)
                    seen.update(line.strip() + b"\n")
            offset += len(line)
        self.fingerprint = seen.hexdigest()

    def _example(self, line: bytes, number: int) -> Example:
        where = f"{self._path}, {'line' if self._array is None else 'entry'} {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise DataError(f"{where}: not JSON ({error}); allowed: {_ALLOWED}") from error
        return example_of(row, self._images, where)

    @staticmethod
    def _check_files(example: Example) -> None:
        for image in example.images:
            if isinstance(image, Path) and not image.is_file():
                raise DataError(f"{example.where}: no image {image}; allowed: an existing file")


def example_of(row: Any, images: Path, where: str) -> Example:
    """The conversation of one row.

    Args:
        row: the parsed JSON; unknown fields are ignored.
        images: the folder that image paths are relative to.
        where: how errors name the row.
    Raises:
        DataError: the row is unusable.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}; allowed: {_ALLOWED}")
    return Example(
        _turns(row.get("conversations"), where),
        tuple(images / name for name in image_names(row, where)),
        where,
    )


def image_names(row: dict[str, Any], where: str) -> list[str]:
    """The images that a row's "image" field names: none, one path, or a list of them.

    Raises:
        DataError: the field is something else, or names a URL.
    """
    named = row.get("image")
    named = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise DataError(f"{where}: image is {row['image']!r}; allowed: a path or a list of them")
    for name in filter(is_url, named):
        allowed = "local files (download it first)"
        raise DataError(f"{where}: image {name!r} is a URL; allowed: {allowed}")
    return named


def _turns(said: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(said, list) or not said or len(said) % 2:
        count = f"{len(said)} entries" if isinstance(said, list) else f"{said!r}"
        raise DataError(
            f"{where}: conversations: {count}; allowed: one or more pairs of human and gpt turns"
        )
    texts = []
    for number, entry in enumerate(said):
        speaker = ("human", "gpt")[number % 2]
        is_entry = isinstance(entry, dict) and isinstance(entry.get("value"), str)
        if not is_entry or entry.get("from") != speaker:
            raise DataError(
                f"{where}: conversations[{number}] is {entry!r}; allowed: "
                f'{{"from": "{speaker}", "value": "..."}}'
            )
        texts.append(entry["value"])
    return tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))
