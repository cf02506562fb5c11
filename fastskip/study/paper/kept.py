"""Measurements in files: made once under the same settings, so that a run can be cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastskip.study.fingerprints import fingerprint
from fastskip.study.json_file import write_json

Document = dict[str, Any]


def kept(path: Path, settings: Mapping[str, Any], make: Callable[[], Document]) -> Document:
    """What a file holds if it was made under these settings, else what `make` gives."""
    found = read(path, settings)
    if found is None:
        found = {"settings": settings, **make()}
        write_json(path, found)
    return found


def read(path: Path, settings: Mapping[str, Any]) -> Document | None:
    """What a file holds; None without the file, or if it is of other settings or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_same = isinstance(found, dict) and found.get("settings") == json.loads(json.dumps(settings))
    return found if is_same else None


def name_of(settings: Mapping[str, Any]) -> str:
    """A file's name by what was measured: two cells may be the same thing."""
    return fingerprint(json.dumps(settings).encode())
