"""Short hashes of what a result was measured on, besides the model: the items, the policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fastskip.fingerprints import LENGTH, fingerprint
from fastskip.policy import SkipPolicy
from fastskip.study.evaluation.items import Item


def items_fingerprint(items: Sequence[Item]) -> str:
    """Equal for equal questions, histories, answers, kinds, metrics and images in the same order.

    Raises:
        OSError: an image file cannot be read.
    """
    found = hashlib.sha256()
    for item in items:
        history = [(turn.question, turn.answer) for turn in item.history]
        content = [item.question, item.references, item.kind, item.metric.value, history]
        found.update(json.dumps([*content, len(item.images)]).encode())
        for image in item.images:
            found.update(_bytes_of(image))
    return found.hexdigest()[:LENGTH]


def policy_fingerprint(policy: SkipPolicy) -> str:
    """Equal for policies that skip the same and whose routers have the same weights; name and
    provenance are ignored."""
    skipped = replace(policy, name="", provenance={})
    said = json.dumps(skipped.to_dict(), sort_keys=True).encode()
    paths = [policy.path_of(rule.weights) for rule in policy.routers if rule.weights]
    # a missing file is reported when the policy is set
    learned = (hashlib.sha256(path.read_bytes()).digest() for path in paths if path.is_file())
    return fingerprint(b"".join((said, *learned)))


def combined(*parts: Any) -> str:
    """One fingerprint of several parts."""
    return fingerprint(json.dumps(parts).encode())


def _bytes_of(image: Image | Path) -> bytes:
    if isinstance(image, Path):
        return hashlib.sha256(image.read_bytes()).digest()
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
