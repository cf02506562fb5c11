"""Short fingerprints of content, and of a model's weights."""

from __future__ import annotations

import hashlib
import re

import torch

LENGTH = 16
"""Hexadecimal digits: enough that no two results of one user collide."""
_SAMPLES = 64
"""Numbers read from each weight."""
_SMALLEST = 2.0**-16
"""Below this, float16 is less precise than bfloat16; such numbers count as zero."""


def fingerprint(data: bytes) -> str:
    """A short hash of `data`."""
    return hashlib.sha256(data).hexdigest()[:LENGTH]


def model_fingerprint(model: torch.nn.Module) -> str:
    """Equal for equal weights, on any device, in any dtype, under any policy.

    Hashes the shape and a few numbers of each weight, rounded to bfloat16: a 7B model is not read
    in full, and changes to other numbers go unnoticed. Of a weight's name only its layer and last
    two parts count, since versions of transformers differ in the rest. A float32 checkpoint loaded
    in float16 is rounded twice and looks like another model.
    """
    names, shapes, samples = [], [], []
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        step = max(1, len(flat) // _SAMPLES)
        names.append(name)
        shapes.append(tuple(weight.shape))
        samples.append(flat[::step][:_SAMPLES].to(torch.bfloat16))
    sizes = [len(each) for each in samples]
    # One copy for all, since every transfer from a GPU has latency.
    numbers = torch.cat(samples).float().cpu()
    # Also gives zeros one sign.
    numbers = torch.where(numbers.abs() < _SMALLEST, torch.zeros(()), numbers)
    weights = sorted(
        f"{_key(name)} {shape} ".encode() + part.numpy().tobytes()
        for name, shape, part in zip(names, shapes, numbers.split(sizes), strict=True)
    )
    found = hashlib.sha256()
    for weight in weights:
        found.update(hashlib.sha256(weight).digest())
    return found.hexdigest()[:LENGTH]


def _key(name: str) -> str:
    """For example "11 q_proj.weight"."""
    return " ".join([*re.findall(r"\d+", name), ".".join(name.split(".")[-2:])])
