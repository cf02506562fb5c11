"""What `eval --out` writes for a report: one JSON file and thumbnails of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.fingerprints import model_fingerprint
from fastskip.json_file import write_json
from fastskip.prompts.images import load_image
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.items import Item
from fastskip.study.evaluation.judging import Judgement
from fastskip.study.provenance import circumstances

SCHEMA_VERSION = 1
FILE, IMAGES = "eval.json", "images"
LONGEST = 336
"""Maximum length of a thumbnail's longer side, in pixels."""


def write_result(
    folder: Path, model: Any, exam: Exam, found: Sequence[Judgement], new_tokens: int
) -> Path:
    """Write the items, thumbnails of their images, and the judgements; replaces existing files.

    Args:
        folder: created if it does not exist.
        model: the one that was judged.
        exam: the items.
        found: the judgements, the dense model's first.
        new_tokens: how many tokens the timed runs generated.
    Returns:
        The JSON file.
    """
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    shown = _Thumbnails(folder)
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


class _Thumbnails:
    """Thumbnails in a folder: one per image, however many items share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path | int, str] = {}

    def name_of(self, image: Image | Path) -> str:
        """The thumbnail's path relative to the folder; written on first use."""
        # items keep their images alive, so no two images share an id
        key = image if isinstance(image, Path) else id(image)
        if key not in self._names:
            name = f"{IMAGES}/{len(self._names)}.jpg"
            picture = (load_image(image) if isinstance(image, Path) else image).convert("RGB")
            picture.thumbnail((LONGEST, LONGEST))
            picture.save(self._folder / name, quality=90)
            self._names[key] = name
        return self._names[key]


def _item(item: Item, shown: _Thumbnails) -> dict[str, Any]:
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
