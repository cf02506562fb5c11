"""What tells one content from another in a few characters; of a model, its weights."""

from __future__ import annotations

import hashlib
import re

import torch

LENGTH = 16
"""Hexadecimal digits: enough that two results of one person never meet."""
_LOOKED_AT = 64
"""Numbers that are read of each weight."""
_LEAST = 2.0**-16
"""Below this, float16 holds fewer digits than bfloat16; such numbers count as zeros."""


def fingerprint(data: bytes) -> str:
    """What tells one content from another."""
    return hashlib.sha256(data).hexdigest()[:LENGTH]


def model_fingerprint(model: torch.nn.Module) -> str:
    """The same for the same weights, wherever they lie, in whatever dtype, under any policy.

    Shapes and a few numbers of each weight, rounded to bfloat16: a model of 7B is not read whole,
    and a change of other numbers alone is not seen. Of a weight's name its layer and its last two
    parts count, as versions of transformers differ in the rest. A checkpoint of float32 that is
    loaded in float16 is rounded twice, and looks like another model.
    """
    names, shapes, few = [], [], []
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        step = max(1, len(flat) // _LOOKED_AT)
        names.append(name)
        shapes.append(tuple(weight.shape))
        few.append(flat[::step][:_LOOKED_AT].to(torch.bfloat16))
    sizes = [len(each) for each in few]
    # Together, since each way from a GPU takes its time.
    numbers = torch.cat(few).float().cpu()
    # Zeros have one sign.
    numbers = torch.where(numbers.abs() < _LEAST, torch.zeros(()), numbers)
    weights = sorted(
        f"{_place(name)} {shape} ".encode() + part.numpy().tobytes()
        for name, shape, part in zip(names, shapes, numbers.split(sizes), strict=True)
    )
    found = hashlib.sha256()
    for weight in weights:
        found.update(hashlib.sha256(weight).digest())
    return found.hexdigest()[:LENGTH]


def _place(name: str) -> str:
    """Such as "11 q_proj.weight"."""
    return " ".join([*re.findall(r"\d+", name), ".".join(name.split(".")[-2:])])
