"""Measurements, stored line by line, so that an interrupted search resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastskip.policy import SkipPolicy
from fastskip.study.fingerprints import combined, policy_fingerprint
from fastskip.study.kept_lines import KeptLines

FILE = "measured.jsonl"


class MeasurementCache:
    """Values by key, in a folder if there is one, else in memory only."""

    def __init__(self, folder: Path | None) -> None:
        """Reads what is there."""
        self._lines = None if folder is None else KeptLines(folder / FILE, "value")
        self._values: dict[str, Any] = dict(self._lines or ())

    def value(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value stored under a key, or else what `measure` returns: plain data."""
        if key not in self._values:
            # As it will be read back, so that a resumed run equals one that never stopped.
            self._values[key] = json.loads(json.dumps(measure(), allow_nan=False))
            if self._lines is not None:
                self._lines.append(key, self._values[key])
        return self._values[key]


def key_of(base: str, what: str, policy: SkipPolicy | None = None) -> str:
    """A value's key; `base` stands for model, items and settings; policies' names do not count."""
    own = None if policy is None else policy_fingerprint(policy)
    return combined(base, what, own)
