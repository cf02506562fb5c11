"""Measurements, stored line by line, so that an interrupted search resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastskip.policy import SkipPolicy
from fastskip.study.fingerprints import combined, policy_fingerprint

FILE = "measured.jsonl"


class MeasurementCache:
    """Values by key, in a file of one JSON object per line; an incomplete line is ignored."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is there; without a path, values are only held in memory."""
        self._path, self._values = path, {}
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                try:
                    document = json.loads(line)
                    self._values[document["of"]] = document["value"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
            if text and not text.endswith("\n"):  # the next line must not join an incomplete one
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    _values: dict[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value stored under a key, or else what `measure` returns: plain data."""
        if key not in self._values:
            # As it will be read back, so that a resumed run equals one that never stopped.
            self._values[key] = json.loads(json.dumps(measure(), allow_nan=False))
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"of": key, "value": self._values[key]}) + "\n")
        return self._values[key]


def key_of(base: str, what: str, policy: SkipPolicy | None = None) -> str:
    """A value's key; `base` stands for model, items and settings; policies' names do not count."""
    own = None if policy is None else policy_fingerprint(policy)
    return combined(base, what, own)
