"""What `eval --out` leaves for a report: one JSON file, and small pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.images import load_image
from fastskip.study.evaluation import Exam
from fastskip.study.fingerprints import model_fingerprint
from fastskip.study.items import Item
from fastskip.study.json_file import write_json
from fastskip.study.judging import Judgement
from fastskip.study.provenance import circumstances

SCHEMA_VERSION = 1
FILE, IMAGES = "eval.json", "images"
LONGEST = 336
"""Pixels of a small picture's longer side, at the most."""


def write_result(
    folder: Path, model: Any, exam: Exam, found: Sequence[Judgement], new_tokens: int
) -> Path:
    """Write the items, their pictures and how they were answered; what was there is replaced.

    Args:
        folder: made where it is missing.
        model: the one that was judged.
        exam: what was asked.
        found: how they were answered, the dense model first.
        new_tokens: tokens that were timed.
    Returns:
        The JSON file.
    """
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    shown = _Pictures(folder)
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval",
        "circumstances": {
            **circumstances(model),
            "model_fingerprint": model_fingerprint(model),
            "items_fingerprint": exam.fingerprint,
        },
        "new_tokens": new_tokens,
        "items": [_item(item, shown) for item in exam.items],
        "judgements": [each.to_dict() for each in found],
    }
    return write_json(folder / FILE, document)


class _Pictures:
    """Small pictures in a folder, each of them once, however many items are about it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path | int, str] = {}

    def name_of(self, image: Image | Path) -> str:
        """Where the small picture lies, seen from the folder."""
        # open pictures are held by their items, so that no other one gets the same number
        key = image if isinstance(image, Path) else id(image)
        if key not in self._names:
            name = f"{IMAGES}/{len(self._names)}.jpg"
            picture = (load_image(image) if isinstance(image, Path) else image).convert("RGB")
            picture.thumbnail((LONGEST, LONGEST))
            picture.save(self._folder / name, quality=90)
            self._names[key] = name
        return self._names[key]


def _item(item: Item, shown: _Pictures) -> dict[str, Any]:
    images = [shown.name_of(image) for image in item.images]
    return {
        "question": item.question,
        "references": list(item.references),
        "kind": item.kind,
        "metric": item.metric.value,
        "image": images[0] if images else None,
        "images": images,
        "history": [{"question": turn.question, "answer": turn.answer} for turn in item.history],
    }
