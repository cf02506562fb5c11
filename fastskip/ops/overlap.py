"""Launches of a decode step that overlap on the device: see ``kernels.overlap``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch

LEAST = (9, 0)
"""The compute capability that it takes."""


class Overlap(Enum):
    """How launches of a decode step follow one another.

    ``NONE``: each begins when all that was before it is done. ``START``: it begins while what the
    one before has written is still on its way, and waits for that first. ``READ``: before it waits
    it reads what cannot be on its way any more: counts of entries, and flags that the one before
    has read as well.

    The second one is the default: on an H200 a step takes 1 % less by it. Cells ``overlap`` of the
    GPU protocol measure all; the third is adopted where they say so.
    """

    NONE = "none"
    START = "start"
    READ = "read"


@contextmanager
def overlapping(how: Overlap) -> Iterator[None]:
    """Kernels launched in this block overlap, as far as they take part; without, none is looked
    for."""
    if how is Overlap.NONE:
        yield
        return
    from fastskip.kernels import overlap as kernels

    with kernels.overlapping(True, reads_ahead=how is Overlap.READ):
        yield


def can_overlap(device: torch.device) -> bool:
    """Whether launches can overlap there: on CUDA, from compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST
