"""Launches of a decode step that overlap on the device: see ``kernels.overlap``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST = (9, 0)
"""The compute capability that it takes."""


@contextmanager
def overlapping(overlaps: bool) -> Iterator[None]:
    """Kernels launched in this block overlap, as far as they take part; without, none is looked
    for."""
    if not overlaps:
        yield
        return
    from fastskip.kernels import overlap as kernels

    with kernels.overlapping(True):
        yield


def can_overlap(device: torch.device) -> bool:
    """Whether launches can overlap there: on CUDA, from compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST
