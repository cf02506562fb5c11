"""Fields of result files, validated as they are read: errors name file, field and value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SCHEMA_VERSION = 1
MOST = 1e30
"""Larger than any measured number, and small enough that charts can multiply without overflow."""


class ReportError(ValueError):
    """A report cannot be made; names the file, the field, its value and what is allowed."""

    def __init__(self, file: Path, field: str, value: object, allowed: str) -> None:
        self.file, self.field, self.value, self.allowed = file, field, value, allowed
        shown = value if isinstance(value, Problem) else f"got {_short(value)}"
        where = f"{file}: {field}" if field else f"{file}"
        super().__init__(f"{where}: {shown}; allowed: {allowed}")


class Problem(str):
    """A description of what is wrong, shown in place of a value."""


@dataclass(frozen=True, slots=True)
class Field:
    """A value in a result file, and its location."""

    file: Path
    name: str
    value: Any

    def refuse(self, allowed: str, problem: str | None = None) -> NoReturn:
        """Raise a `ReportError` about the value."""
        shown = self.value if problem is None else Problem(problem)
        raise ReportError(self.file, self.name, shown, allowed)

    def get(self, name: str) -> Field:
        """A required field of an object."""
        found = self._inner(name)
        if name not in self.object():
            found.refuse("this field, as fastskip writes it", "missing")
        return found

    def may(self, name: str) -> Field | None:
        """An optional field of an object; `None` if it is null or missing."""
        return None if self.object().get(name) is None else self._inner(name)

    def object(self) -> Mapping[str, Any]:
        """The value as an object."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return self.value

    def each(self) -> Iterator[Field]:
        """The values of a list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        for number, value in enumerate(self.value):
            yield Field(self.file, f"{self.name}[{number}]", value)

    def text(self) -> str:
        """The value as a string."""
        if not isinstance(self.value, str):
            self.refuse("a string")
        return self.value

    def one_of(self, allowed: tuple[str, ...]) -> str:
        """The value as one of the allowed strings."""
        if self.value not in allowed:
            self.refuse(", ".join(allowed))
        return str(self.value)

    def truth(self) -> bool:
        """The value as a bool."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def number(self, least: float = -MOST, most: float = MOST) -> float:
        """The value as a finite number in a range."""
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not is_number or not least <= self.value <= most:
            self.refuse(f"a finite number in [{least:g}, {most:g}]")
        return float(self.value)

    def may_number(self, name: str, least: float = -MOST) -> float | None:
        """An optional field of an object as a number; `None` if it is null or missing."""
        found = self.may(name)
        return None if found is None else found.number(least)

    def count(self, least: int = 0) -> int:
        """The value as an integer in a range."""
        if type(self.value) is not int or not least <= self.value <= MOST:
            self.refuse(f"an integer in [{least}, {MOST:g}]")
        return int(self.value)

    def _inner(self, name: str) -> Field:
        value = self.object().get(name)
        return Field(self.file, f"{self.name}.{name}" if self.name else name, value)


def read_document(path: Path, kind: str) -> Field:
    """Read a result file of this kind.

    Raises:
        ReportError: the file cannot be read, is of another kind, or has another schema version.
    """
    document = read_object(path)
    written = document.get("kind")
    if written.value != kind:
        written.refuse(f'"{kind}"')
    version = document.get("schema_version")
    if version.count(1) != SCHEMA_VERSION:
        version.refuse(f"{SCHEMA_VERSION}; a newer fastskip wrote this file")
    return document


def read_object(path: Path) -> Field:
    """Read a JSON file that holds an object.

    Raises:
        ReportError: the file cannot be read, or holds something else.
    """
    allowed = "a JSON file that fastskip wrote"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(path, "", Problem(f"cannot be read ({error})"), allowed) from error
    except (ValueError, RecursionError) as error:  # also raised for numbers of thousands of digits
        raise ReportError(path, "", Problem(f"not JSON ({error})"), allowed) from error
    document = Field(path, "", value)
    document.object()
    return document


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."
