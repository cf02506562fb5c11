"""Where entries of a cache lie: slots per sequence, in segments that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

# A segment that was not reserved has at least this many slots.
SEGMENT_SLOTS = 128


@dataclass(frozen=True, slots=True)
class Segment:
    """Slots ``start .. start + count`` of every sequence."""

    start: int
    count: int


class EntryTable:
    """The slots of all layers that hold entries of the same rows.

    A sequence's entries lie in column order in slots ``0 .. counts[b]``. The table also says which
    segments exist; each layer has one K and one V buffer per segment. Which columns have entries
    follows from their classes, except in a hollow layer's table, where ``held [B, C]`` says so.
    """

    def __init__(self, batch: int, *, is_hollow: bool) -> None:
        self.counts = [0] * batch
        self._held = torch.zeros(batch, 0, dtype=torch.bool) if is_hollow else None
        # What came since, not joined yet: every step adds to it, and it is rarely read.
        self._later: list[Tensor] = []
        self.segments: list[Segment] = []

    @property
    def held(self) -> Tensor | None:
        """``[B, C]`` of a hollow layer: which columns have entries."""
        if self._held is not None and self._later:
            self._held, self._later = torch.cat((self._held, *self._later), dim=1), []
        return self._held

    @held.setter
    def held(self, held: Tensor | None) -> None:
        self._held, self._later = held, []

    def append(self, columns: Tensor) -> None:
        """Appends columns ``[B, T]`` of a hollow layer."""
        if self._held is not None and not self._held.shape[1]:
            self._held = columns  # most caches begin with the prompt
        else:
            self._later.append(columns)

    def reserve(self, slots: int) -> None:
        """Adds a segment if fewer than ``slots`` slots exist."""
        have = self.capacity
        if slots > have:
            self.segments.append(Segment(have, max(slots - have, SEGMENT_SLOTS if have else 1)))

    @property
    def capacity(self) -> int:
        return self.segments[-1].start + self.segments[-1].count if self.segments else 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows ``row .. row + count`` go to ``slot .. slot + count`` of one sequence."""

    row: int
    sequence: int
    slot: int
    count: int


class Placement(Protocol):
    """Where the rows of one write go; made once and used by every layer of a table.

    ``buffers``: those of one layer, ``[B, G, count, K]`` for each segment of the table.
    """

    def write(self, buffers: Sequence[Tensor], rows: Tensor) -> None:
        """Copies ``rows [n, G, K]`` into the buffers."""

    def read(self, buffers: Sequence[Tensor]) -> Tensor:
        """The entries at this placement: ``[n, G, K]``, as a copy."""


class LevelPlacement:
    """One row per sequence, in order, all into one slot: a step of equally long sequences."""

    def __init__(self, segments: Sequence[Segment], slot: int) -> None:
        number = next(n for n, own in enumerate(segments) if slot < own.start + own.count)
        self._number, self._slot = number, slot - segments[number].start

    def write(self, buffers: Sequence[Tensor], rows: Tensor) -> None:
        buffers[self._number].select(2, self._slot).copy_(rows)

    def read(self, buffers: Sequence[Tensor]) -> Tensor:
        return buffers[self._number].select(2, self._slot).clone()


class RowPlacement:
    """Any rows, each with a sequence and a slot of its own."""

    def __init__(self, segments: Sequence[Segment], sequences: Tensor, slots: Tensor) -> None:
        """``sequences``, ``slots``: ``[n]`` int64 each, on the host."""
        self._segments, self._sequences, self._slots = segments, sequences, slots

    def write(self, buffers: Sequence[Tensor], rows: Tensor) -> None:
        for segment, buffer in zip(self._segments, buffers, strict=True):
            for run in self._runs:
                first = max(run.slot, segment.start)
                last = min(run.slot + run.count, segment.start + segment.count)
                if first >= last:
                    continue
                source = rows[run.row + first - run.slot : run.row + last - run.slot]
                target = buffer[run.sequence, :, first - segment.start : last - segment.start]
                target.copy_(source.transpose(0, 1))

    def read(self, buffers: Sequence[Tensor]) -> Tensor:
        first, slots = buffers[0], self._slots
        out = first.new_zeros(len(slots), first.shape[1], first.shape[3])
        for segment, buffer in zip(self._segments, buffers, strict=True):
            inside = (slots >= segment.start) & (slots < segment.start + segment.count)
            index = inside.nonzero().squeeze(1)
            out[index] = buffer[self._sequences[index], :, slots[index] - segment.start]
        return out

    @cached_property
    def _runs(self) -> list[_Run]:
        """Maximal runs of consecutive rows that go to consecutive slots."""
        sequences, slots = self._sequences, self._slots
        if not len(slots):
            return []
        breaks = (slots.diff() != 1) | (sequences.diff() != 0)
        bounds = [0, *(breaks.nonzero().squeeze(1) + 1).tolist(), len(slots)]
        return [
            _Run(start, int(sequences[start]), int(slots[start]), stop - start)
            for start, stop in pairwise(bounds)
        ]
