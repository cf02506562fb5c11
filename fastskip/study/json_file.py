"""Results as JSON files, written in one go: a reader sees the old file or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, document: Any, *, indent: int | None = None) -> Path:
    """Writes a document, and its folder if there is none; a run that is cut off leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=indent) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path
