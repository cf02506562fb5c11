"""The building blocks of a page's sections: plain data, tagged by `form`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from fastskip.study.report.drawing import Picture

NOTHING = "–"
"""The text of a cell without a value."""


class Tone(StrEnum):
    """How a cell is coloured; its text always says the same in words."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: its text, small print below it, and badges in a tone."""

    text: str
    small: str = ""
    badges: tuple[str, ...] = ()
    tone: Tone = Tone.PLAIN

    @property
    def is_empty(self) -> bool:
        """Whether the cell has no value."""
        return self.text == NOTHING


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    `name_at`: the column that names each row; those after it hold numbers if `has_numbers`.
    `is_folded`: collapsed until clicked.
    """

    form: ClassVar[str] = "table"
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    name_at: int = 1
    has_numbers: bool = True
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its caption."""

    form: ClassVar[str] = "figure"
    picture: Picture
    caption: str


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    form: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Points:
    """A list; the lines of a text are its paragraphs."""

    form: ClassVar[str] = "points"
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading within a section."""

    form: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    form: ClassVar[str] = "facts"
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One policy's answer to an example's question."""

    label: str
    text: str
    score: str
    tone: Tone


@dataclass(frozen=True, slots=True)
class Example:
    """An item on which answers differ from dense; `images`: data URIs; `before`: earlier turns."""

    form: ClassVar[str] = "example"
    question: str
    references: str
    kind: str
    images: tuple[str, ...]
    before: tuple[tuple[str, str], ...]
    answers: tuple[ShownAnswer, ...]


Block = Table | Figure | Text | Points | Heading | Facts | Example


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; `name`: its anchor."""

    name: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Its charts, in order."""
        return tuple(each.picture for each in self.blocks if isinstance(each, Figure))
