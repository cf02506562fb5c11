"""The results file: one line of JSON per cell, appended as soon as the cell is done."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]
FILE = "results.jsonl"
ROOT = Path(__file__).parents[2]
PACKAGES = re.compile(r"/[^\s\"']*/site-packages/")
INTERPRETERS = re.compile(r"/[^\s\"']*/bin/python")


def without_places(text: str) -> str:
    """A traceback or log without the paths of the machine that wrote it."""
    text = PACKAGES.sub("", text.replace(f"{ROOT}/", ""))
    return INTERPRETERS.sub("python", text)


@dataclass(frozen=True)
class Line:
    """What one run of a cell found, or how it failed."""

    cell: str
    seconds: float
    values: Values = field(default_factory=dict)
    error: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""

    @property
    def is_done(self) -> bool:
        return self.error is None

    @property
    def reason(self) -> str:
        """The last line of the error."""
        return str(self.error).rstrip().splitlines()[-1][:200]


class Results:
    """The lines in ``folder/results.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE

    def lines(self) -> dict[str, Line]:
        """The latest line of each cell; lines cut short by a killed process are ignored."""
        return self.parse(self.path.read_text("utf-8")) if self.path.is_file() else {}

    @staticmethod
    def parse(text: str) -> dict[str, Line]:
        found: dict[str, Line] = {}
        for part in text.splitlines():
            try:
                line = Line(**json.loads(part))
            except (ValueError, TypeError):
                continue
            found[line.cell] = line
        return found

    def done(self) -> set[str]:
        """Cells that need not run again."""
        return {name for name, line in self.lines().items() if line.is_done}

    def values(self, cell: str) -> Values | None:
        """What ``cell`` found, if it is done."""
        line = self.lines().get(cell)
        return line.values if line is not None and line.is_done else None

    def append(self, line: Line) -> None:
        """Appends the line and flushes it to disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = asdict(line)
        record["date"] = record["date"] or f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        text = without_places(json.dumps(record)) + "\n"
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed process left half a line
                    text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
