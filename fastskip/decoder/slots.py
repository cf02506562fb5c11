"""Where entries of a cache lie: slots per sequence, in segments that never move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    def __init__(self, batch: int, *, is_hollow: bool = False) -> None:
        self.counts = [0] * batch
        self._held = torch.zeros(batch, 0, dtype=torch.bool) if is_hollow else None
        # What came since, not joined yet: every step adds to it, and it is rarely read.
        self._later: list[Tensor] = []
        self.segments: list[Segment] = []

    @property
    def is_hollow(self) -> bool:
        return self._held is not None

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


class Placement:
    """Where the rows of one write go; made once and used by every layer of a table."""

    def __init__(
        self, list_rows: Callable[[], tuple[Tensor, Tensor]], level: int | None = None
    ) -> None:
        """``list_rows``: the sequences and slots of the rows, ``[n]`` int64 on the host; called
        only when needed. ``level``: the slot of all, if each sequence has one row, in order."""
        self._list_rows, self._level = list_rows, level
        self._runs: list[_Run] | None = None
        self._spot: tuple[int, int] | None = None

    @classmethod
    def of(cls, sequences: Tensor, slots: Tensor) -> Placement:
        """``[n]`` int64 each, on the host."""
        return cls(lambda: (sequences, slots))

    @classmethod
    def level(cls, batch: int, slot: int) -> Placement:
        """One row per sequence, in order, all into one slot: a step of equally long sequences."""
        return cls(lambda: (torch.arange(batch), torch.full((batch,), slot)), slot)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        return self._list_rows()

    def write(self, segments: Sequence[Segment], buffers: Sequence[Tensor], rows: Tensor) -> None:
        """Copies ``rows [n, G, K]`` into ``buffers``, one ``[B, G, count, K]`` per segment."""
        if self._level is not None:
            number, slot = self._spot or self._find(segments, self._level)
            buffers[number].select(2, slot).copy_(rows)
            return
        for segment, buffer in zip(segments, buffers, strict=True):
            for run in self.runs():
                first = max(run.slot, segment.start)
                last = min(run.slot + run.count, segment.start + segment.count)
                if first >= last:
                    continue
                source = rows[run.row + first - run.slot : run.row + last - run.slot]
                target = buffer[run.sequence, :, first - segment.start : last - segment.start]
                target.copy_(source.transpose(0, 1))

    def _find(self, segments: Sequence[Segment], level: int) -> tuple[int, int]:
        """The segment of a level, and the slot in it; the same for every layer of the table."""
        number = next(n for n, s in enumerate(segments) if level < s.start + s.count)
        self._spot = number, level - segments[number].start
        return self._spot

    def read(self, segments: Sequence[Segment], buffers: Sequence[Tensor]) -> Tensor:
        """The entries at this placement: ``[n, G, K]``, as a copy."""
        first, (sequences, slots) = buffers[0], self._rows
        out = first.new_zeros(len(slots), first.shape[1], first.shape[3])
        for segment, buffer in zip(segments, buffers, strict=True):
            inside = (slots >= segment.start) & (slots < segment.start + segment.count)
            index = inside.nonzero().squeeze(1)
            out[index] = buffer[sequences[index], :, slots[index] - segment.start]
        return out

    def runs(self) -> list[_Run]:
        """Maximal runs of consecutive rows that go to consecutive slots."""
        if self._runs is None:
            self._runs, (sequences, slots) = [], self._rows
            count = len(slots)
            if count:
                breaks = (slots.diff() != 1) | (sequences.diff() != 0)
                starts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist(), count]
                for start, stop in zip(starts[:-1], starts[1:], strict=True):
                    self._runs.append(
                        _Run(start, int(sequences[start]), int(slots[start]), stop - start)
                    )
        return self._runs
