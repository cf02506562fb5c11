"""Values by key in a file of JSON lines, appended as they are made, so that a run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastskip.json_file import json_text


class KeptLines:
    """A file of lines `{"of": key, NAME: value}`; damaged or partial lines are passed over."""

    def __init__(self, path: Path, name: str) -> None:
        """`name`: what the field of a value is called."""
        self._path, self._name = path, name

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """The keys and values in the file, in the order in which they were appended."""
        if not self._path.is_file():
            return
        for line in self._path.read_bytes().splitlines():
            document = _parsed(line)
            if document.keys() >= {"of", self._name} and isinstance(document["of"], str):
                yield document["of"], document[self._name]

    def append(self, key: str, value: Any) -> None:
        """Append a value, which must be plain data."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # a killed process left a partial line
            file.write(json_text({"of": key, self._name: value}).encode() + b"\n")


def _parsed(line: bytes) -> dict[str, Any]:
    """The object of a line; empty if it holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
