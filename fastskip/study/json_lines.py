"""User-written files of one JSON object per line, or of one array; errors name the row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Format:
    """What a file may hold.

    Attributes:
        what: what its rows are, in the plural.
        fields: the fields that an object may have.
        allowed: the format in words, for error messages.
        error: the exception type to raise.
        free: a field that marks objects of a foreign format, which may have any other fields.
        takes_array: whether a single array of objects is accepted as well.
    """

    what: str
    fields: frozenset[str]
    allowed: str
    error: type[ValueError]
    free: str | None = None
    takes_array: bool = False

    def read(self, path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], str]]:
        """Each row's object, and how errors name the row; empty lines are skipped.

        Raises:
            ValueError: of type ``error``: the file or a row of it cannot be used.
        """
        for text, where in self.rows(path):
            yield self.parse(text, where), where

    def rows(self, path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
        """Each row as text, and how errors name it; empty lines are skipped.

        Raises:
            ValueError: of type ``error``: the file cannot be read, or has no rows.
        """
        file, is_empty = Path(path), True
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            problem = f"{file}: {reason}; allowed: a readable file, {self.allowed}"
            raise self.error(problem) from error
        if self.takes_array and text.lstrip()[:1] == "[":
            found: Any = ((json.dumps(entry), "entry") for entry in self._array(text, file))
        else:
            found = ((line, "line") for line in text.split("\n"))
        for number, (row, name) in enumerate(found, start=1):
            if row.strip():
                is_empty = False
                yield row, f"{file}, {name} {number}"
        if is_empty:
            raise self.error(f"{file}: no {self.what}; allowed: {self.allowed}")

    def parse(self, text: str, where: str) -> dict[str, Any]:
        """The object of a row.

        Raises:
            ValueError: of type ``error``: the row is not an object, or has an unknown field.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"{where}: not JSON ({error}); allowed: {self.allowed}"
            raise self.error(problem) from error
        if not isinstance(document, dict):
            raise self.error(f"{where}: got {document!r}; allowed: {self.allowed}")
        unknown = sorted(document.keys() - self.fields)
        if unknown and self.free not in document:
            raise self.error(f"{where}: unknown field {unknown[0]!r}; allowed: {self.allowed}")
        return document

    def _array(self, text: str, file: Path) -> list[Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"{file}: not JSON ({error}); allowed: {self.allowed}"
            raise self.error(problem) from error
        assert isinstance(found, list), "begins with a bracket"
        return found
