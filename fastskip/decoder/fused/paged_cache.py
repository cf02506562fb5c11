"""The device executor's cache: the same columns and counts, with entries in pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from operator import add
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.fused.pages import PagePool
from fastskip.decoder.seen_columns import STAYS
from fastskip.ops.allocate import outside_inference_mode
from fastskip.ops.contracts import Pages
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Hollow, Pool, Table
from fastskip.policy import TokenClass
from fastskip.tokens import CODES, TokenLayout, member


class PagedCache(SkipCache):
    """A ``SkipCache`` whose entries lie in pages.

    ``pools`` has one pool of pages per entry table, and one for all hollow layers of the same
    classes, which may need as many pages. Which rows have entries in a hollow layer is known only
    on the device: ``device_counts [B]`` and the table's ``held [B, C]`` lie there, and the table's
    own counts are upper bounds. ``hollow_counts [tables, >= B]`` is the memory of all
    ``device_counts``, so that one copy covers them all.
    """

    def __init__(self, plan: SkipPlan, anchor: Tensor, *, reserve: int = 0) -> None:
        """``anchor``: a tensor that outlives the cache; gives dtype and device."""
        super().__init__(plan, reserve=reserve)
        self.anchor = anchor
        self.pools: dict[Pool, PagePool] = {}
        self.device_counts: dict[Table, Tensor] = {}
        self.hollow_counts: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        copied = PagedCache(self.plan, self.anchor, reserve=self.reserve)
        for name, value in vars(self).items():
            if name not in ("plan", "anchor"):
                setattr(copied, name, deepcopy(value, memo))
        return copied

    def pages_of(self, layer: int) -> Pages:
        return self.pools[self.plan.layers[layer].pool].pages_of(layer)

    def grow(self, layout: TokenLayout, like: Tensor | None) -> None:
        super().grow(layout, like)
        hollow = self.plan.hollow_tables
        if like is None or not hollow:
            return
        if not self.device_counts:
            counts = aligned_counts(len(hollow), layout.batch, self.anchor.device)
            self._set_counts(counts, hollow, layout.batch)
            none = torch.zeros(layout.batch, 0, dtype=torch.bool, device=self.anchor.device)
            for key in hollow:
                self.tables[key].held = none
        for pool, layers in self.plan.layers_by_pool.items():
            if isinstance(pool, Hollow):
                needed = list(map(add, self._most(pool), layout.counts(pool.classes)))
                self.make_room(layers[0], needed, layout, like)

    def _set_counts(self, counts: Tensor, keys: Iterable[Table], batch: int) -> None:
        self.hollow_counts = counts
        self.device_counts = {key: own[:batch] for key, own in zip(keys, counts, strict=True)}

    def _most(self, pool: Pool) -> list[int]:
        """``[B]``: the most entries that a layer of a pool has, or may have."""
        counts = [self.tables[key].counts for key in self.plan.tables_by_pool[pool]]
        return [max(own) for own in zip(*counts, strict=True)]

    def make_room(
        self, key: Table, needed: Sequence[int], layout: TokenLayout, like: Tensor
    ) -> None:
        pool = self.plan.layers[self.plan.layers_by_table[key][0]].pool
        if pool not in self.pools:
            shape = self.plan.shape
            self.pools[pool] = PagePool(
                self.anchor,
                layout.batch,
                self.plan.layers_by_pool[pool],
                shape.num_kv_heads,
                shape.head_dim,
            )
        later = max(0, self.reserve - layout.first_column - layout.width)
        grows = TokenClass.GENERATED in self._holding(key)
        self.pools[pool].reserve(needed, later if grows else 0)

    def _count_held(
        self, layout: TokenLayout, held: Mapping[Table, Tensor]
    ) -> dict[Table, list[int]]:
        return {key: layout.counts(self._holding(key)) for key in held}

    def crop(self, tokens_to_remove: int) -> None:
        """Like ``SkipCache.crop``; waits for the device if a layer is hollow."""
        super().crop(tokens_to_remove)
        for key, counts in self.device_counts.items():
            counts.copy_(torch.tensor(self.tables[key].counts, dtype=torch.int32))

    def make_room_for_steps(self, done: int, steps: int) -> bool:
        """Makes room for ``steps`` generated rows per sequence after ``done`` uncommitted ones;
        returns whether pages were added."""
        later = max(0, self.reserve - self.columns - done - steps)
        added = False
        for key, pool in self.pools.items():
            if TokenClass.GENERATED in key.classes:
                needed = [count + done + steps for count in self._most(key)]
                added = pool.reserve(needed, later) or added
        return added

    def commit_steps(self, steps: int, held: Tensor | None) -> None:
        """Counts ``steps`` columns of generated rows, whose entries decode steps have written.

        ``held [tables, B, steps]`` bool, on the device: which of them have entries in hollow
        layers, in the order of ``plan.hollow_tables``; ``None`` without steps or such layers.
        """
        batch = self.seen.batch
        new = torch.full((batch, steps), CODES[TokenClass.GENERATED])
        positions, axes = self.seen.following(1 + torch.arange(steps))
        self.seen.append(new, positions, torch.full_like(new, STAYS), axes)
        if held is not None and self.hollow_counts is not None:
            self.hollow_counts[:, :batch] += held.sum(2, dtype=torch.int32)
            hollow = [self.tables[key] for key in self.device_counts]
            before = torch.stack([table.held for table in hollow if table.held is not None])
            for table, columns in zip(hollow, torch.cat((before, held), dim=2), strict=True):
                table.held = columns
        grown = {
            holding: member(new, holding).sum(1).tolist()
            for holding in {self._holding(key) for key in self.tables}
        }
        for key, table in self.tables.items():
            table.counts = list(map(add, table.counts, grown[self._holding(key)]))

    def live_bytes(self) -> int:
        """Bytes of live entries; ``plan.kv_bytes`` predicts them."""
        entry = self.plan.shape.num_kv_heads * self.plan.shape.head_dim * 2
        entry *= self.anchor.element_size()
        total = 0
        for key, table in self.tables.items():
            counts = self.device_counts.get(key)
            slots = sum(table.counts) if counts is None else int(counts.sum())
            total += slots * len(self.plan.layers_by_table[key]) * entry
        return total

    def allocated_bytes(self) -> int:
        """Bytes of all pages: live entries, columns reserved for ``generate``, and under ``PAGE``
        slots (after growth: ``GROWTH_PAGES`` pages) per sequence and layer."""
        return sum(pool.allocated_bytes for pool in self.pools.values())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) the given sequences."""
        super().batch_select_indices(indices)
        chosen = indices.tolist()
        for pool in self.pools.values():
            pool.select(chosen)
        if self.hollow_counts is not None:
            old, keys = self.hollow_counts, tuple(self.device_counts)
            counts = aligned_counts(len(keys), len(indices), old.device)
            counts[:, : len(indices)] = old[:, indices.to(old.device)]
            self._set_counts(counts, keys, len(indices))

    def reset(self) -> None:
        """Drops all columns and frees the pages."""
        super().reset()
        self.pools.clear()
        self.device_counts.clear()
        self.hollow_counts = None


def aligned_counts(tables: int, batch: int, device: torch.device) -> Tensor:
    """int32 zeros; each row is aligned to 16 bytes, as a separate tensor would be."""
    with outside_inference_mode():  # like ``empty``: steps write to it
        return torch.zeros(tables, -(-batch // 4) * 4, dtype=torch.int32, device=device)
