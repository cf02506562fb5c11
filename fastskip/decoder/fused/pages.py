"""Memory of a cache on the device: pages of a fixed number of slots, in slabs that never move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastskip.ops.allocate import empty, to_device
from fastskip.ops.contracts import PAGE, Pages

# What a sequence gets when it outgrows its reservation by one slot.
GROWTH_PAGES = 4


class PagePool:
    """The pages of all layers that hold the same set of classes.

    One page holds ``PAGE`` slots of one sequence for every layer of the set, so a sequence's table
    is the same for all of them. Growth adds a slab; stored entries never move.
    """

    def __init__(
        self, anchor: Tensor, batch: int, layers: Sequence[int], groups: int, head_dim: int
    ) -> None:
        self.anchor, self.groups, self.head_dim = anchor, groups, head_dim
        self.layers = tuple(layers)
        self.slabs: list[Tensor] = []
        self._pages: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        self._table: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        copied = PagePool(self.anchor, len(self._pages), self.layers, self.groups, self.head_dim)
        copied.slabs = [slab.clone() for slab in self.slabs]
        copied._pages = [list(pages) for pages in self._pages]
        return copied

    @property
    def page_elements(self) -> int:
        """Elements of one page: K and V of every layer of the set."""
        return len(self.layers) * 2 * self.groups * PAGE * self.head_dim

    @property
    def allocated_bytes(self) -> int:
        return sum(slab.numel() * slab.element_size() for slab in self.slabs)

    def reserve(self, needed: Sequence[int], later: int) -> bool:
        """Makes room for ``needed[b]`` slots per sequence; returns whether pages were added.

        A sequence that needs pages also gets those for ``later`` further slots, or a few to grow
        into.

        Raises:
            torch.OutOfMemoryError: says what to lower; the pool is unchanged.
        """
        wanted = []
        for pages, slots in zip(self._pages, needed, strict=True):
            short = -(-slots // PAGE) - len(pages)
            if short > 0:
                foreseen = -(-(slots + later) // PAGE) - len(pages)
                grown = short + GROWTH_PAGES - 1 if pages and not later else short
                wanted.append(max(foreseen, grown))
            else:
                wanted.append(0)
        total = sum(wanted)
        if not total:
            return False
        self.slabs.append(self._allocate(total, needed))
        number, page = len(self.slabs) - 1, 0
        for pages, count in zip(self._pages, wanted, strict=True):
            pages.extend((number, page + offset) for offset in range(count))
            page += count
        self._table = None
        return True

    def _allocate(self, pages: int, needed: Sequence[int]) -> Tensor:
        elements = pages * self.page_elements
        try:
            return empty((elements,), self.anchor.dtype, self.anchor.device)
        except torch.OutOfMemoryError as error:
            size = elements * self.anchor.element_size() / 2**30
            raise torch.OutOfMemoryError(
                f"key/value cache: no memory for {size:.2f} GiB more ({len(needed)} sequences of "
                f"up to {max(needed)} entries in {len(self.layers)} layers); lower the batch size, "
                "max_new_tokens or the prompt length, or use a policy whose skipped attention "
                "leaves no entries (kv: omit)"
            ) from error

    def offsets(self) -> list[list[int]]:
        """Where each sequence's pages lie, in elements from the anchor."""
        size = self.anchor.element_size()
        starts = [(slab.data_ptr() - self.anchor.data_ptr()) // size for slab in self.slabs]
        return [
            [starts[slab] + page * self.page_elements for slab, page in pages]
            for pages in self._pages
        ]

    @property
    def width(self) -> int:
        """Columns of the table: the pages of the sequence that has the most."""
        return max(1, *map(len, self._pages)) if self._pages else 1

    @property
    def table(self) -> Tensor:
        """``[B, P]`` int64 on the device; shorter sequences repeat their last page."""
        if self._table is None:
            host = torch.tensor(self.rows(self.width), dtype=torch.int64)
            self._table = to_device(host.view(-1, self.width), self.anchor.device)
        return self._table

    def rows(self, width: int) -> list[list[int]]:
        """The table's rows, each padded to ``width``."""
        return [row + (row[-1:] or [0]) * (width - len(row)) for row in self.offsets()]

    def offset_of(self, layer: int) -> int:
        """Elements from the start of a page to a layer's part."""
        return self.layers.index(layer) * 2 * self.groups * PAGE * self.head_dim

    def pages_of(self, layer: int) -> Pages:
        """The layer's entries as the operations see them."""
        return Pages(
            self.anchor,
            self.table,
            self.offset_of(layer),
            self.groups,
            self.head_dim,
            self.slabs,
        )

    def keys(self, layer: int, sequence: int, count: int) -> Tensor:
        """``[G, count, K]`` keys of a sequence's first entries, as a new tensor."""
        size, start = self.groups * PAGE * self.head_dim, self.offset_of(layer)
        parts = []
        for slab, page in self._pages[sequence][: -(-count // PAGE)]:
            first = page * self.page_elements + start
            flat = self.slabs[slab][first : first + size]
            parts.append(flat.view(self.groups, PAGE, self.head_dim))
        if not parts:
            return self.anchor.new_empty(self.groups, 0, self.head_dim)
        return torch.cat(parts, dim=1)[:, :count]

    def select(self, sequences: Sequence[int]) -> None:
        """Keeps (or repeats) sequences: each gets its own pages in one new slab."""
        chosen = [self._pages[sequence] for sequence in sequences]
        flat = [page for pages in chosen for page in pages]
        if flat:
            slab = self._allocate(len(flat), [len(pages) * PAGE for pages in chosen])
            target = slab.view(len(flat), self.page_elements)
            for number, old in enumerate(self.slabs):
                pairs = [(to, page) for to, (source, page) in enumerate(flat) if source == number]
                if pairs:
                    to, page = torch.tensor(pairs).T.to(slab.device)
                    target[to] = old.view(-1, self.page_elements)[page]
            self.slabs[:] = [slab]
        start = 0
        self._pages = []
        for pages in chosen:
            self._pages.append([(0, start + number) for number in range(len(pages))])
            start += len(pages)
        self._table = None
