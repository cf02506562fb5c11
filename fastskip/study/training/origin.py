"""What a run depends on, stored beside its checkpoints: only the same run resumes from them."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fastskip.fingerprints import fingerprint, model_fingerprint
from fastskip.json_file import write_json
from fastskip.loading import plan_of
from fastskip.prompts.conversations import DataError
from fastskip.study.training.events import Masks
from fastskip.study.training.learner import TrainingError
from fastskip.study.training.settings import Settings
from fastskip.wording import dtype_name

FILE = "run.json"
_MAY_CHANGE = {"steps", "epochs", "save_every", "resume", "skip_broken", "gradient_checkpointing"}
"""Settings that do not affect the steps before a checkpoint."""
_SAMPLED = 64
"""About how many examples are read of data without a fingerprint of their own."""
_SHOWN = 160


def origin_of(
    model: Any, learned: Collection[str], data: Any, settings: Settings, masks: Masks | None
) -> dict[str, Any]:
    """Everything that the steps of a run depend on, by name, as plain data for JSON.

    Of the model's weights only the frozen ones count (``learned`` names the others), as a
    checkpoint restores the rest. Data without a fingerprint of their own are identified by their
    length and a sample of their texts; streams are not identified.
    """
    chosen = asdict(settings) | {"learning_rate": settings.peak}
    policy = plan_of(model).policy.to_dict()
    found = {
        "policy": {name: policy.get(name) for name in policy.keys() - {"name", "provenance"}},
        "data": _data(data),
        "model": {
            "dtype": dtype_name(model.dtype),
            "parameters": sum(p.numel() for p in model.parameters()),
            "frozen": _Frozen(model, learned).fingerprint(),
        },
        "masks": None if masks is None else getattr(masks, "digest", "of unknown weights"),
        "settings": {name: chosen[name] for name in chosen.keys() - _MAY_CHANGE},
    }
    as_read: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False, sort_keys=True))
    return as_read


def keep(folder: Path, origin: dict[str, Any]) -> None:
    """Writes the origin of a new run."""
    write_json(folder / FILE, origin, indent=1)


def check(folder: Path, origin: dict[str, Any]) -> None:
    """Compares a resumed run with the origin of its checkpoints, field by field.

    Raises:
        TrainingError: they differ, or the checkpoints' origin cannot be read.
    """
    path, allowed = folder / FILE, "the same values, or another folder for this run"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"{path}: {error}; without it, the checkpoints cannot be matched to this run"
        raise TrainingError(f"{problem}; allowed: a folder without checkpoints") from error
    theirs, ours = _flat(kept), _flat(origin)
    differs = [
        f"{name}: {_short(ours.get(name))}, in the checkpoints {_short(theirs.get(name))}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differs:
        raise TrainingError(f"{folder}: {'; '.join(differs)}; allowed: {allowed}")


class _Frozen(nn.Module):
    """The frozen weights of a model, as `model_fingerprint` reads them."""

    def __init__(self, model: nn.Module, learned: Collection[str]) -> None:
        super().__init__()
        named = model.named_parameters()
        self._weights = {name: weight for name, weight in named if name not in learned}

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        yield from self._weights.items()

    def fingerprint(self) -> str | None:
        return model_fingerprint(self) if self._weights else None


def _data(data: Any) -> dict[str, Any]:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return {"examples": None, "fingerprint": None}
    count = len(data)
    own = getattr(data, "fingerprint", None)
    if own is None:
        texts = [_texts(data, number) for number in range(0, count, max(1, count // _SAMPLED))]
        own = fingerprint(json.dumps(texts).encode())
    return {"examples": count, "fingerprint": own}


def _texts(data: Any, number: int) -> Any:
    try:
        return [(turn.question, turn.answer) for turn in data[number].turns]
    except DataError:
        return None  # reported, or left out, when training reaches it


def _flat(origin: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in origin.items() if isinstance(origin, dict) else ():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
