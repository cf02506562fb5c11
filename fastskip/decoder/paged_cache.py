"""The cache of the device executor: the same columns and counts, entries in pages."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from operator import add
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.pages import PagePool
from fastskip.ops.contracts import Pages
from fastskip.plan import SkipPlan
from fastskip.policy import TokenClass
from fastskip.tokens import CODES, TokenLayout, member


class PagedCache(SkipCache):
    """A ``SkipCache`` whose entries lie in pages.

    ``pools`` has one pool of pages for every set of classes that some layer holds.
    """

    def __init__(self, plan: SkipPlan, anchor: Tensor, *, reserve: int = 0) -> None:
        """``anchor``: a tensor that outlives the cache; gives dtype and device."""
        super().__init__(plan, reserve=reserve)
        self.anchor = anchor
        self.pools: dict[frozenset[TokenClass], PagePool] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        copied = PagedCache(self.plan, self.anchor, reserve=self.reserve)
        for name, value in vars(self).items():
            if name not in ("plan", "anchor"):
                setattr(copied, name, deepcopy(value, memo))
        return copied

    @property
    def sets(self) -> list[frozenset[TokenClass]]:
        """The sets of classes that some layer holds, in the order of the layers."""
        return list(self._layers_by_table)

    def pages_of(self, layer: int) -> Pages:
        return self.pools[self.plan.layers[layer].holding].pages_of(layer)

    def _make_room(
        self,
        holding: frozenset[TokenClass],
        needed: Sequence[int],
        layout: TokenLayout,
        like: Tensor,
    ) -> None:
        if holding not in self.pools:
            shape = self.plan.shape
            self.pools[holding] = PagePool(
                self.anchor,
                layout.batch,
                self._layers_by_table[holding],
                shape.num_kv_heads,
                shape.head_dim,
            )
        later = max(0, self.reserve - layout.first_column - layout.width)
        self.pools[holding].reserve(needed, later if TokenClass.GENERATED in holding else 0)

    def make_room_for_steps(self, done: int, steps: int) -> bool:
        """Room for ``steps`` generated rows a sequence after ``done`` uncommitted ones; says
        whether pages were added."""
        later = max(0, self.reserve - self.columns - done - steps)
        added = False
        for holding, pool in self.pools.items():
            if TokenClass.GENERATED in holding:
                needed = [count + done + steps for count in self.tables[holding].counts]
                added = pool.reserve(needed, later) or added
        return added

    def commit_steps(self, steps: int) -> None:
        """Counts ``steps`` columns of generated rows, whose entries decode steps have written."""
        batch = self.codes.shape[0]
        new = torch.full((batch, steps), CODES[TokenClass.GENERATED])
        positions = self.last_positions()[:, None] + 1 + torch.arange(steps)
        self.codes = torch.cat((self.codes, new), dim=1)
        self.positions = torch.cat((self.positions, positions), dim=1)
        for holding, table in self.tables.items():
            grown = member(new, holding).sum(1).tolist()
            table.counts = list(map(add, table.counts, grown))

    def live_bytes(self) -> int:
        """Bytes of live entries; ``plan.kv_bytes`` predicts them."""
        entry = self.plan.shape.num_kv_heads * self.plan.shape.head_dim * 2
        entry *= self.anchor.element_size()
        return sum(
            sum(self.tables[holding].counts) * len(pool.layers) * entry
            for holding, pool in self.pools.items()
        )

    def allocated_bytes(self) -> int:
        """Bytes of all pages: the live entries, the columns reserved for ``generate``, and less
        than ``PAGE`` slots a sequence and layer (after growth: than ``GROWTH_PAGES`` pages)."""
        return sum(pool.allocated_bytes for pool in self.pools.values())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) the given sequences."""
        super().batch_select_indices(indices)
        chosen = indices.tolist()
        for pool in self.pools.values():
            pool.select(chosen)

    def reset(self) -> None:
        """Forgets every column; pages are given back."""
        super().reset()
        self.pools.clear()
