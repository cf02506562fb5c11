"""What a cell is, and in what setting it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.results import Results, Values

PATIENCE = 10
"""How much longer cells may take in small, where kernels are interpreted."""


@dataclass(frozen=True)
class Setting:
    """Where cells run. ``tiny``: small shapes on the CPU, kernels in Triton's interpreter."""

    results: Results
    device: torch.device
    is_tiny: bool
    minutes: float = 10.0
    dtype: torch.dtype = torch.bfloat16
    began: float = field(default_factory=time.perf_counter)

    @property
    def impl(self) -> str | None:
        """Who computes models: in small the device executor's torch form."""
        return "torch" if self.is_tiny else None

    @property
    def folder(self) -> Path:
        """Where files beside the results file go."""
        return self.results.folder

    @property
    def seconds_left(self) -> float:
        """Of what the cell may take: loops that can be shorter look at it."""
        allowed = 60 * self.minutes * (PATIENCE if self.is_tiny else 1)
        return allowed - (time.perf_counter() - self.began)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    ``minutes`` is what it may take; after twice that it is ended. ``is_default``: in the run of
    23 minutes.
    """

    name: str
    about: str
    minutes: float
    run: Callable[[Setting], Values]
    is_default: bool = False

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


def is_lost(device: torch.device) -> bool:
    """Whether the device has failed for good: nothing that runs on it any more would be right."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def chosen(cells: list[Cell], names: list[str]) -> list[Cell]:
    """The cells that ``names`` name, in the protocol's order; the default ones without names.

    A name is that of a cell, or its front part up to a dot.
    """
    if not names:
        return [cell for cell in cells if cell.is_default]
    for name in names:
        if not any(_is_named(cell, name) for cell in cells):
            known = ", ".join(dict.fromkeys(cell.group for cell in cells))
            raise ValueError(f"{name!r}: no such cell; the groups are {known} (see --list)")
    return [cell for cell in cells if any(_is_named(cell, name) for name in names)]


def _is_named(cell: Cell, name: str) -> bool:
    return cell.name == name or cell.name.startswith(f"{name}.")
