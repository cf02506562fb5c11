"""Measurements in files, reused under the same settings, so that a run can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastskip.fingerprints import fingerprint
from fastskip.json_file import write_json

Document = dict[str, Any]


def kept(path: Path, settings: Mapping[str, Any], make: Callable[[], Document]) -> Document:
    """The file's contents if it was made under these settings; else what `make` returns, stored."""
    found = read(path, settings)
    if found is None:
        found = {"settings": settings, **make()}
        write_json(path, found)
    return found


def read(path: Path, settings: Mapping[str, Any]) -> Document | None:
    """The file's contents; None if it is missing, broken or made under other settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_same = isinstance(found, dict) and found.get("settings") == json.loads(json.dumps(settings))
    return found if is_same else None


def name_of(settings: Mapping[str, Any]) -> str:
    """A file name by what was measured: cells that measure the same thing share a file."""
    return fingerprint(json.dumps(settings).encode())
