"""Where the rows of one forward lie in the slots of a cache, old entries and new."""

from __future__ import annotations

from operator import add

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.slots import LevelPlacement, Placement, RowPlacement
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Staged, Table
from fastskip.tokens import Rows, TokenLayout, member


class SlotMap:
    """Slots of a forward's rows, per entry table; shared by all layers of the table."""

    def __init__(self, plan: SkipPlan, cache: SkipCache, layout: TokenLayout) -> None:
        self._plan, self._cache, self._layout = plan, cache, layout
        # The rows of each stage.
        self.stages = [layout]
        self.held: dict[Table, Tensor] = {}
        # By the id of a tensor given to ``hold``: the tensor, its columns, counts by sequence.
        self._known: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        self._counts: dict[Table, list[int]] = {}
        self._placements: dict[tuple[Table, int], tuple[Rows, Placement]] = {}
        self._columns: dict[tuple[Table, int], Tensor] = {}

    def hold(self, layer: int, held: Tensor) -> list[int]:
        """Notes which rows a hollow layer will hold; returns each sequence's entries with them.

        Many layers may share one tensor ``held [N]``, which is then unpacked once.
        """
        known = self._known.get(id(held))
        if known is None:
            columns = self._layout.unpack(held)
            known = self._known[id(held)] = held, columns, columns.sum(1).tolist()
        _, self.held[layer], new = known
        found = self._counts[layer] = list(map(add, self._cache.tables[layer].counts, new))
        return found

    def counts(self, layer: int) -> list[int]:
        table = self._plan.layers[layer].table
        found = self._counts.get(table)
        if found is None:
            have, new = self._cache.tables[table].counts, self._new(table)
            found = self._counts[table] = list(map(add, have, new))
        return found

    def layout_of(self, layer: int) -> TokenLayout:
        """The rows that are left in a layer: what its rows index."""
        return self.stages[self._plan.layers[layer].stage]

    def placement(self, layer: int, rows: Rows, layout: TokenLayout) -> Placement:
        """Where packed ``rows`` of ``layout`` lie in ``layer``."""
        table = self._plan.layers[layer].table
        # The rows are kept with their placement, so an id is not reused while it is a key.
        found = self._placements.get((table, id(rows)))
        if found is None:
            found = self._placements[table, id(rows)] = (rows, self._place(table, rows, layout))
        return found[1]

    def columns(self, layer: int, sequence: int) -> Tensor:
        table = self._plan.layers[layer].table
        found = self._columns.get((table, sequence))
        if found is None:
            before = self._cache.held(table)[sequence]
            found = torch.cat((before, self._mask(table)[sequence])).nonzero().squeeze(1)
            self._columns[table, sequence] = found
        return found

    def codes(self, layer: int, sequence: int) -> Tensor:
        seen = self._cache.seen.codes[sequence], self._layout.source[sequence]
        return torch.cat(seen)[self.columns(layer, sequence)]

    def _new(self, table: Table) -> list[int]:
        """New entries of each sequence."""
        assert isinstance(table, Staged)
        return self.stages[table.stage].counts(table.classes)

    def _mask(self, table: Table) -> Tensor:
        """Which of the new columns have entries: ``[B, T]``."""
        if isinstance(table, int):
            return self.held[table]
        return member(self.stages[table.stage].source, table.classes)

    def _place(self, table: Table, rows: Rows, layout: TokenLayout) -> Placement:
        counts, segments = self._cache.tables[table].counts, self._cache.tables[table].segments
        if layout.is_step and rows.count == layout.batch and len(set(counts)) == 1:
            return LevelPlacement(segments, counts[0])
        sequences = rows.take(layout.sequences)
        rank = self._mask(table).cumsum(1) - 1
        new = rank[sequences, rows.take(layout.columns) - layout.first_column]
        return RowPlacement(segments, sequences, torch.tensor(counts)[sequences] + new)
