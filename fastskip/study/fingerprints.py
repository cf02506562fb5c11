"""What a result was measured on, in a few characters: the model, the items, the policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from fastskip.policy import SkipPolicy
from fastskip.study.items import Item

LENGTH = 16
"""Hexadecimal digits: enough that two results of one person never meet."""
_LOOKED_AT = 64
"""Numbers that are read of each weight."""


def fingerprint(data: bytes) -> str:
    """What tells one content from another."""
    return hashlib.sha256(data).hexdigest()[:LENGTH]


def model_fingerprint(model: torch.nn.Module) -> str:
    """The same for the same weights, wherever they lie and under any policy.

    Names, shapes, dtypes and a few numbers of each weight: a model of 7B is not read whole.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        step = max(1, len(flat) // _LOOKED_AT)
        numbers = flat[::step][:_LOOKED_AT].double().cpu().numpy().tobytes()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + numbers)
    return found.hexdigest()[:LENGTH]


def items_fingerprint(items: Sequence[Item]) -> str:
    """The same for the same questions, histories, answers, metrics and pictures, in the same order.

    Raises:
        OSError: an image file cannot be read.
    """
    found = hashlib.sha256()
    for item in items:
        history = [(turn.question, turn.answer) for turn in item.history]
        told = [item.question, item.references, item.kind, item.metric.value, history]
        found.update(json.dumps([*told, len(item.images)]).encode())
        for image in item.images:
            found.update(_bytes_of(image))
    return found.hexdigest()[:LENGTH]


def policy_fingerprint(policy: SkipPolicy) -> str:
    """The same for policies that say the same."""
    return fingerprint(json.dumps(policy.to_dict(), sort_keys=True).encode())


def combined(*parts: Any) -> str:
    """One fingerprint of several."""
    return fingerprint(json.dumps(parts).encode())


def _bytes_of(image: Image | Path) -> bytes:
    if isinstance(image, Path):
        return hashlib.sha256(image.read_bytes()).digest()
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
