"""Files of one JSON object a line, as users write them: every error names the line."""

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
        what: what its lines are, in the plural.
        fields: the names that an object may have.
        allowed: the format in words, for errors.
        error: what is raised.
    """

    what: str
    fields: frozenset[str]
    allowed: str
    error: type[ValueError]

    def read(self, path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], str]]:
        """Each line's object, and how errors name the line; empty lines are passed over.

        Raises:
            ValueError: of the kind ``error``: the file or a line of it cannot be used.
        """
        file, is_empty = Path(path), True
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            text = f"{file}: {error}; allowed: a readable file, {self.allowed}"
            raise self.error(text) from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                is_empty = False
                where = f"{file}, line {number}"
                yield self._object(line, where), where
        if is_empty:
            raise self.error(f"{file}: no {self.what}; allowed: {self.allowed}")

    def _object(self, line: str, where: str) -> dict[str, Any]:
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            text = f"{where}: not JSON ({error}); allowed: {self.allowed}"
            raise self.error(text) from error
        if not isinstance(document, dict):
            raise self.error(f"{where}: got {document!r}; allowed: {self.allowed}")
        unknown = sorted(document.keys() - self.fields)
        if unknown:
            raise self.error(f"{where}: unknown field {unknown[0]!r}; allowed: {self.allowed}")
        return document
