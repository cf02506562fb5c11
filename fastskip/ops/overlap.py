"""Launches of a decode step that overlap on the device: see ``kernels.overlap``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

LEAST = (9, 0)
"""The compute capability that it takes."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How launches overlap.

    ``ahead``: bytes of each weight row that a product asks into the L2 cache while the kernel
    before it still runs. More keeps memory busier, until lines leave the cache before their use.
    """

    ahead: int = 0

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise ValueError(f"ahead: {self.ahead} bytes; allowed: 0 and more")


@contextmanager
def overlapping(overlap: Overlap | None) -> Iterator[None]:
    """Kernels launched in this block overlap as far as they take part; ``None`` changes nothing."""
    if overlap is None:
        yield
        return
    from fastskip.kernels import overlap as kernels

    with kernels.overlapping(overlap.ahead):
        yield


def check_overlap(device: torch.device) -> None:
    """Whether launches can overlap there.

    Raises:
        ValueError: they cannot.
    """
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < LEAST:
        what = device.type if found is None else f"compute capability {found[0]}.{found[1]}"
        needed = f"CUDA with compute capability {LEAST[0]}.{LEAST[1]} or later"
        raise ValueError(f"overlap: {what}; allowed: {needed}, elsewhere None")
