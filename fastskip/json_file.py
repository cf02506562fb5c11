"""JSON that every reader takes, and files of it: a reader sees the old file or the new one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastskip.atomic_files import atomic_write


def json_text(document: Any, *, indent: int | None = None) -> str:
    """A document as JSON; NaN and infinities, which JSON cannot express, become null."""
    return json.dumps(_with_nulls(document), indent=indent, allow_nan=False)


def write_json(path: Path, document: Any, *, indent: int | None = None) -> Path:
    """Write a document, creating its folder; an interrupted run leaves no partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(json_text(document, indent=indent) + "\n", encoding="utf-8")
    return path


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _with_nulls(each) for name, each in value.items()}
    return [_with_nulls(each) for each in value] if isinstance(value, list | tuple) else value
