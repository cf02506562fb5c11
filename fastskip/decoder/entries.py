"""Keys and values during one forward: rows in packed order in, slots in column order out.

Two implementations of one interface. ``CachedEntries`` writes into a cache and reads views of it.
``GradientEntries`` keeps the new rows as tensors that autograd can follow (a cache, if there is
one, gets detached copies).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastskip.decoder.attention_maps import AttentionMaps
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.slot_map import SlotMap
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Table
from fastskip.tokens import Rows, TokenLayout


class Keys(Protocol):
    """What a removal needs of a forward's entries."""

    def columns(self, layer: int, sequence: int) -> Tensor:
        """The column of each entry of a sequence, new ones included: ``[count]``, host."""

    def keys(self, layer: int, sequence: int, count: int) -> Tensor:
        """``[G, count, K]``: the keys of a sequence's first entries."""

    def past(self, layer: int, sequence: int) -> Tensor | None:
        """``[G, n, K]``: a sequence's keys from earlier forwards, if any."""

    def enter(self, layout: TokenLayout) -> None:
        """Announces which rows remain for the layers after the next removal."""

    @property
    def left(self) -> Sequence[TokenLayout]:
        """What ``enter`` announced, for the cache."""


class Entries(Keys, Protocol):
    """The key/value store of one forward.

    Attributes:
        maps: the recorder of attention maps, if any.
    """

    maps: AttentionMaps | None

    def hold(self, layer: int, held: Tensor) -> None:
        """Announces which packed rows ``[N]`` bool (host) will have entries in ``layer``, before
        any is stored: for a hollow layer, where the plan cannot know."""

    def append(self, layer: int, rows: Rows, keys: Tensor, values: Tensor) -> None:
        """Stores K and V ``[n, G, K]`` of packed rows in ``layer``."""

    def reuse(self, layer: int, source: int, rows: Rows) -> None:
        """Stores in ``layer`` a copy of the rows' own entries in ``source``."""

    def read(self, layer: int, sequences: slice, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """K and V segments ``[b, G, n_i, K]`` of the first ``count`` slots of ``sequences``."""

    def codes(self, layer: int, sequence: int) -> Tensor:
        """The class of each entry of a sequence, as ``columns``."""

    def counts(self, layer: int) -> list[int]:
        """Entries of each sequence, new ones included."""

    def average(self, first: int, second: int, rows: Rows) -> None:
        """Replaces the rows' new entries in both layers by their mean."""

    def adopt(self, layer: int, source: int) -> None:
        """Replaces a layer's entries of earlier forwards by those of ``source``, a layer of the
        same table."""

    @property
    def held(self) -> Mapping[Table, Tensor]:
        """What ``hold`` announced, for the cache: ``[B, T]`` by table."""


class CachedEntries:
    """Entries written to a cache in place and read as views of it."""

    def __init__(
        self, plan: SkipPlan, cache: SkipCache, layout: TokenLayout, like: Tensor | None
    ) -> None:
        cache.grow(layout, like)
        self.maps: AttentionMaps | None = None
        self._plan, self._cache, self._batch = plan, cache, layout.batch
        self._layout, self._like = layout, like
        self._map = SlotMap(plan, cache, layout)
        self.counts, self.columns = self._map.counts, self._map.columns
        self.codes, self.layout_of = self._map.codes, self._map.layout_of

    @property
    def held(self) -> Mapping[Table, Tensor]:
        """``[B, T]``: new columns that have entries, for each layer announced by ``hold``."""
        return self._map.held

    def hold(self, layer: int, held: Tensor) -> None:
        needed = self._map.hold(layer, held)
        if self._like is not None:
            self._cache.make_room(layer, needed, self._layout, self._like)

    @property
    def left(self) -> Sequence[TokenLayout]:
        return self._map.stages[1:]

    def enter(self, layout: TokenLayout) -> None:
        self._cache.enter(len(self._map.stages), layout, self._like)
        self._map.stages.append(layout)

    def keys(self, layer: int, sequence: int, count: int) -> Tensor:
        here = slice(sequence, sequence + 1)
        return torch.cat(self.read(layer, here, count)[0], dim=2)[0]

    def past(self, layer: int, sequence: int) -> Tensor | None:
        count = self._cache.tables[self._plan.layers[layer].table].counts[sequence]
        return self.keys(layer, sequence, count) if count else None

    def append(self, layer: int, rows: Rows, keys: Tensor, values: Tensor) -> None:
        target = self._map.placement(layer, rows, self.layout_of(layer))
        entries = self._cache.entries[layer]
        target.write(entries.keys, keys)
        target.write(entries.values, values)

    def reuse(self, layer: int, source: int, rows: Rows) -> None:
        self.append(layer, rows, *self._read(source, rows, self.layout_of(layer)))

    def average(self, first: int, second: int, rows: Rows) -> None:
        layout = self.layout_of(first)
        both = zip(*(self._read(layer, rows, layout) for layer in (first, second)), strict=True)
        keys, values = ((a + b) / 2 for a, b in both)
        for layer in (first, second):
            self.append(layer, rows, keys, values)

    def adopt(self, layer: int, source: int) -> None:
        if source not in self._cache.entries:  # nothing was kept so far
            return
        mine, others = self._cache.entries[layer], self._cache.entries[source]
        for kept, taken in ((mine.keys, others.keys), (mine.values, others.values)):
            for own, other in zip(kept, taken, strict=True):
                own.copy_(other)

    def _read(self, layer: int, rows: Rows, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """K and V ``[n, G, K]`` of the new entries of ``rows``, which index ``layout``."""
        origin, entries = self._map.placement(layer, rows, layout), self._cache.entries[layer]
        return origin.read(entries.keys), origin.read(entries.values)

    def read(self, layer: int, sequences: slice, count: int) -> tuple[list[Tensor], list[Tensor]]:
        segments = self._cache.tables[self._plan.layers[layer].table].segments
        entries = self._cache.entries[layer]
        is_all = sequences == slice(0, self._batch)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for number, segment in enumerate(segments):
            used = min(count - segment.start, segment.count)
            if used <= 0:
                break
            for out, buffers in ((keys, entries.keys), (values, entries.values)):
                buffer = buffers[number] if is_all else buffers[number][sequences]
                out.append(buffer if used == segment.count else buffer.narrow(2, 0, used))
        return keys, values


class GradientEntries:
    """Entries as tensors with autograd history, after those that the cache already held."""

    def __init__(
        self, plan: SkipPlan, cache: SkipCache, layout: TokenLayout, like: Tensor | None
    ) -> None:
        """``like=None``: the cache is not kept, so nothing is copied into it."""
        self.maps: AttentionMaps | None = None
        self._stored = CachedEntries(plan, cache, layout, like)
        self.is_kept = like is not None
        self._plan, self._cache, self._layout = plan, cache, layout
        self._new: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        # With checkpointing a layer may run again after the cache has counted this forward.
        self._past = {name: list(table.counts) for name, table in cache.tables.items()}
        self.counts, self.columns = self._stored.counts, self._stored.columns
        self.codes, self.hold = self._stored.codes, self._stored.hold
        self.adopt, self.past = self._stored.adopt, self._stored.past
        self.enter, self.layout_of = self._stored.enter, self._stored.layout_of

    @property
    def held(self) -> Mapping[Table, Tensor]:
        return self._stored.held

    @property
    def left(self) -> Sequence[TokenLayout]:
        return self._stored.left

    def forget(self, layer: int) -> None:
        """Called before a layer reruns to recompute its activations: it stores its entries anew."""
        self._new.pop(layer, None)

    def append(self, layer: int, rows: Rows, keys: Tensor, values: Tensor) -> None:
        if self.is_kept:
            self._stored.append(layer, rows, keys.detach(), values.detach())
        self._new.setdefault(layer, []).append((rows.ids(), keys, values))

    def reuse(self, layer: int, source: int, rows: Rows) -> None:
        self.append(layer, rows, *self._of(source, rows, self.layout_of(layer)))

    def average(self, first: int, second: int, rows: Rows) -> None:
        # From here on, only layers above read these entries in this forward: they copy the mean.
        layout = self.layout_of(first)
        both = zip(*(self._of(layer, rows, layout) for layer in (first, second)), strict=True)
        keys, values = ((a + b) / 2 for a, b in both)
        own = rows.ids()
        for layer in (first, second):
            ids, old_keys, old_values = self._merged(layer)
            others = ~torch.isin(ids, own)
            apart = others.to(keys.device)
            kept = ids[others], old_keys[apart], old_values[apart]
            self._new[layer] = [kept, (own, keys, values)]
        if self.is_kept:
            self._stored.average(first, second, rows)

    def _of(self, layer: int, rows: Rows, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """K and V ``[n, G, K]`` of the new entries of ``rows``, which index ``layout``."""
        ids, keys, values = self._merged(layer)
        where = torch.full((self._layout.batch * self._layout.width,), -1, dtype=torch.int64)
        where[self.layout_of(layer).places(ids)] = torch.arange(len(ids))
        index = where[layout.places(rows.ids())].to(keys.device)
        return keys[index], values[index]

    def keys(self, layer: int, sequence: int, count: int) -> Tensor:
        return self.read(layer, slice(sequence, sequence + 1), count)[0][0][0]

    def read(self, layer: int, sequences: slice, count: int) -> tuple[list[Tensor], list[Tensor]]:
        ids, new_keys, new_values = self._merged(layer)
        table, layout = self._plan.layers[layer].table, self.layout_of(layer)
        keys, values = [], []
        for sequence in range(*sequences.indices(layout.batch)):
            mine = (layout.sequences[ids] == sequence).nonzero().squeeze(1)
            mine = mine[torch.argsort(layout.columns[ids[mine]])].to(new_keys.device)
            past = self._past[table][sequence]
            old_keys: list[Tensor] = []
            old_values: list[Tensor] = []  # a cache that is not kept has no buffers
            if past:
                here = slice(sequence, sequence + 1)
                old_keys, old_values = self._stored.read(layer, here, past)
            both = (*old_keys, new_keys[mine].transpose(0, 1)[None])
            keys.append(torch.cat(both, dim=2)[0, :, :count])
            both = (*old_values, new_values[mine].transpose(0, 1)[None])
            values.append(torch.cat(both, dim=2)[0, :, :count])
        return [torch.stack(keys)], [torch.stack(values)]

    def _merged(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, keys, values = zip(*self._new[layer], strict=True)
        return torch.cat(ids), torch.cat(keys), torch.cat(values)
