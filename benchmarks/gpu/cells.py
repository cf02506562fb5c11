"""What a cell is, and in what setting it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.results import Results, Values
from fastskip.ops import Implementation, operations_of
from fastskip.ops.operations import FusedOperations

PATIENCE = 10
"""Cells may take this many times longer with --tiny, where kernels are interpreted."""


@dataclass(frozen=True)
class Setting:
    """Where cells run. ``is_tiny``: tiny shapes on the CPU, kernels in Triton's interpreter."""

    results: Results
    device: torch.device
    is_tiny: bool
    minutes: float = 10.0
    dtype: torch.dtype = torch.bfloat16
    began: float = field(default_factory=time.perf_counter)

    @property
    def impl(self) -> str | None:
        """The implementation of models: the device executor's torch form with --tiny."""
        return "torch" if self.is_tiny else None

    @property
    def ops(self) -> FusedOperations:
        """The operations on their own: compiled, or with --tiny in torch."""
        kind = Implementation.TORCH if self.is_tiny else Implementation.TRITON
        found = operations_of(kind).fused
        assert found is not None
        return found

    @property
    def folder(self) -> Path:
        """The folder for files beside the results file."""
        return self.results.folder

    @property
    def seconds_left(self) -> float:
        """What is left of the cell's minutes; loops that can stop early check it."""
        allowed = 60 * self.minutes * (PATIENCE if self.is_tiny else 1)
        return allowed - (time.perf_counter() - self.began)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    ``minutes``: how long it may take; after twice that it is killed. ``is_default``: part of the
    run of 23 minutes.
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
    """Whether the device has failed for good, so that nothing it computes can be trusted."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def chosen(cells: list[Cell], names: list[str]) -> list[Cell]:
    """The cells that ``names`` select, in the protocol's order; without names the default ones.

    A name is a cell's name, or the leading part of one up to a dot.
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
