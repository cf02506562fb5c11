"""The rows of a forward: their class, sequence, column and position; padding is not a row.

A forward sees ``[B, T]`` columns, some of them padding. The layout packs the real ones into ``N``
rows and orders them by the plan's groups of token classes, so that the rows of a class set are
contiguous: "FFN for text only" is then a GEMM on a view, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.allocate import to_device
from fastskip.policy import TokenClass

PAD = -1
HOST = torch.device("cpu")
CODES = {token_class: code for code, token_class in enumerate(TokenClass)}


def member(codes: Tensor, classes: frozenset[TokenClass]) -> Tensor:
    """Which of ``codes`` are in ``classes``; pads never are."""
    return _membership(classes)[codes]  # PAD indexes the last entry


@cache
def _membership(classes: frozenset[TokenClass]) -> Tensor:
    return torch.tensor([token_class in classes for token_class in CODES] + [False])


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a packed ``[N, ...]`` tensor: a slice if they are contiguous, else an index."""

    index: slice | Tensor
    count: int

    def take(self, packed: Tensor) -> Tensor:
        """The rows: a view for a slice, a copy for an index."""
        if isinstance(self.index, slice):
            return packed if self.count == packed.shape[0] else packed[self.index]
        return packed[to_device(self.index, packed.device)]

    def ids(self, device: torch.device = HOST) -> Tensor:
        """The row numbers ``[count]``."""
        if isinstance(self.index, slice):
            return torch.arange(self.index.start, self.index.stop, device=device)
        return self.index

    def through(self, outer: Rows | None) -> Rows:
        """These rows, which index ``outer`` (if given), as an index into what ``outer`` indexes."""
        return self if outer is None else Rows(self.take(outer.ids()), self.count)


def add_(packed: Tensor, rows: Rows, change: Tensor) -> Tensor:
    """``packed[rows] += change`` in place."""
    if isinstance(rows.index, slice):
        rows.take(packed).add_(change)
        return packed
    return packed.index_add_(0, rows.index.to(packed.device), change)


def add(packed: Tensor, rows: Rows, change: Tensor) -> Tensor:
    """``packed[rows] + change`` as a new tensor, for autograd.

    Under autocast, changes may differ in dtype from the residual stream, which keeps its own.
    """
    change = change.to(packed.dtype)
    if rows.count == packed.shape[0] and isinstance(rows.index, slice):
        return packed + change
    return packed.index_add(0, rows.ids(packed.device), change)


def replace(packed: Tensor, rows: Rows, change: Tensor) -> Tensor:
    """``packed`` with ``change`` at ``rows``, as a new tensor."""
    return packed.index_copy(0, rows.ids(packed.device), change)


class TokenLayout:
    """The rows of one forward.

    Attributes:
        source, source_positions: ``[B, T]`` int64, host: what was packed, padding included.
        batch, width: ``B`` and ``T`` of the forward's input.
        first_column: the column of the first entry along ``T``; earlier columns are in the cache.
        columns, positions, sequences, codes: ``[N]`` int64, on the host, in packed order.
        axes, source_axes: ``[3, N]``, ``[3, B, T]``: time, height and width positions for M-RoPE;
            ``None``: rotary embeddings use ``positions``.
        flat: ``[N]`` where each row lies in the flattened ``[B * T]`` input, -1 for idle rows;
            ``None`` if the rows are all of it, in order.
        bounds: where each group's rows begin, and the end of the last one.

    Idle rows pad a group to a size that layouts share. They have no class (``PAD``) and no column;
    their contents are never read.
    """

    def __init__(
        self,
        source: Tensor,
        positions: Tensor,
        first_column: int,
        groups: Sequence[frozenset[TokenClass]],
        rounded: Callable[[int], int] | None = None,
        *,
        axes: Tensor | None = None,
    ) -> None:
        """Packs ``source [B, T]`` (``CODES`` of each column, or ``PAD``) with its positions.

        ``rounded``: maps a group's number of rows to that with idle rows; ``axes``: as
        ``source_axes``.
        """
        self.source, self.source_positions = source, positions.expand_as(source)
        self.source_axes = axes
        self.batch, self.width = source.shape
        self.first_column = first_column
        self._groups = tuple(groups)
        group_of = torch.full((len(TokenClass) + 1,), len(self._groups), dtype=torch.int64)
        for number, group in enumerate(self._groups):
            for token_class in group:
                group_of[CODES[token_class]] = number
        flat_codes = source.reshape(-1)
        numbers = group_of[flat_codes]  # pads index the last entry and sort after every row
        order = torch.argsort(numbers, stable=True)
        counts = torch.bincount(numbers, minlength=len(self._groups) + 1).tolist()[
            : len(self._groups)
        ]
        order = order[: sum(counts)]
        is_whole = len(order) == flat_codes.numel() and sum(map(bool, counts)) <= 1
        sizes = counts if rounded is None else list(map(rounded, counts))
        self._real: Tensor | None = None
        columns = order
        if sizes != counts:
            order, is_whole = _filled_up(order, counts, sizes), False
            self._real, columns = (order >= 0).nonzero().squeeze(1), order.clamp(min=0)
        self.bounds = (0, *accumulate(sizes))
        self.flat = None if is_whole else order
        self.codes = flat_codes[columns]
        self.positions = self.source_positions.reshape(-1)[columns]
        self.axes = None if axes is None else axes.flatten(1)[:, columns]
        self.sequences = columns // self.width if self.width else columns
        self.columns = columns % self.width + first_column if self.width else columns
        if self._real is not None:
            self.codes = self.codes.masked_fill(order < 0, PAD)
            self.positions = self.positions.masked_fill(order < 0, 0)
        self._rows: dict[frozenset[TokenClass], Rows] = {}
        self._counts: dict[frozenset[TokenClass], list[int]] = {}

    def advanced(self) -> TokenLayout:
        """The same rows one column and position further: the next decode step."""
        step = copy(self)
        step.first_column = self.first_column + self.width
        step.columns = self.columns + self.width
        step.positions = self.positions + self.width
        step.source_positions = self.source_positions + self.width
        if self.axes is not None and self.source_axes is not None:
            step.axes, step.source_axes = self.axes + self.width, self.source_axes + self.width
        return step

    def filled(self, rounded: Callable[[int], int]) -> TokenLayout:
        """The same columns, with each group padded by idle rows to ``rounded`` of its rows."""
        given = self.source, self.source_positions, self.first_column, self._groups
        return TokenLayout(*given, rounded, axes=self.source_axes)

    def without(self, gone: Tensor) -> TokenLayout:
        """The same columns without the rows ``gone [N]`` bool, whose columns become padding."""
        source = self.source.clone()
        source[self.sequences[gone], self.columns[gone] - self.first_column] = PAD
        given = source, self.source_positions, self.first_column, self._groups
        return TokenLayout(*given, axes=self.source_axes)

    def counts(self, classes: frozenset[TokenClass]) -> list[int]:
        """How many columns of ``classes`` each sequence has."""
        found = self._counts.get(classes)
        if found is None:
            found = self._counts[classes] = member(self.source, classes).sum(1).tolist()
        return found

    def __len__(self) -> int:
        rows: int = self.bounds[-1]
        return rows

    @property
    def positions_needed(self) -> int:
        """How many positions rotary tables must cover: the largest one plus 1, and at least 1."""
        largest = self.positions if self.axes is None else self.axes
        return int(largest.max()) + 1 if len(self) else 1

    @property
    def is_step(self) -> bool:
        """Whether there is one row per sequence, in sequence order, as in a decode step.

        A single column of several classes is not in that order, since packing sorts by class.
        """
        return self.width == 1 and self.flat is None

    def rows(self, classes: frozenset[TokenClass]) -> Rows:
        """The rows of a set of classes, a union of the plan's groups, in packed order."""
        found = self._rows.get(classes)
        if found is None:
            spans = [
                (self.bounds[number], self.bounds[number + 1])
                for number, group in enumerate(self._groups)
                if group <= classes and self.bounds[number] < self.bounds[number + 1]
            ]
            found = self._rows[classes] = _join(spans)
        return found

    def locate(self, flat: Tensor) -> Rows:
        """The packed rows at ``flat [n]`` (host) of the flattened ``[B * T]`` input."""
        if self.flat is None:
            return Rows(flat, len(flat))
        where = torch.full((self.batch * self.width,), -1, dtype=torch.int64)
        where[self.real(self.flat)] = self.real(torch.arange(len(self)))
        return Rows(where[flat], len(flat))

    def places(self, rows: Tensor) -> Tensor:
        """Where packed ``rows [n]`` (host) lie in the flattened ``[B * T]`` input."""
        return rows if self.flat is None else self.flat[rows]

    def pack(self, columns: Tensor) -> Tensor:
        """``[B, T, ...] -> [N, ...]``, always new memory."""
        flat = columns.reshape(-1, *columns.shape[2:])
        if self.flat is None:
            return flat.clone()
        return flat[to_device(self.flat.clamp(min=0), flat.device)]

    def unpack(self, rows: Tensor) -> Tensor:
        """``[N, ...] -> [B, T, ...]``; pads read zero."""
        shape = (self.batch, self.width, *rows.shape[1:])
        if self.flat is None:
            return rows.view(shape)
        columns = rows.new_zeros(self.batch * self.width, *rows.shape[1:])
        spots = to_device(self.real(self.flat), rows.device)
        return columns.index_copy(0, spots, self.real(rows)).view(shape)

    def real(self, rows: Tensor) -> Tensor:
        """``[N, ...]`` without idle rows, in packed order; ``rows`` itself if there are none."""
        return rows if self._real is None else rows[to_device(self._real, rows.device)]


def _filled_up(order: Tensor, counts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """``order`` of groups with ``counts`` rows, each padded with -1 to its size."""
    parts = [
        F.pad(part, (0, size - count), value=-1)
        for part, count, size in zip(order.split(list(counts)), counts, sizes, strict=True)
    ]
    return torch.cat(parts)


def _join(spans: Sequence[tuple[int, int]]) -> Rows:
    """Adjacent spans as one slice, separate spans as an index."""
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    if not merged:
        return Rows(slice(0, 0), 0)
    if len(merged) == 1:
        return Rows(slice(*merged[0]), merged[0][1] - merged[0][0])
    index = torch.cat([torch.arange(start, stop) for start, stop in merged])
    return Rows(index, len(index))
