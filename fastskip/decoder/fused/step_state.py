"""What decode steps keep on the device, at the same addresses for every step and every cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.pages import PagePool
from fastskip.decoder.fused.parts import (
    NO_ROWS,
    NO_TARGETS,
    Copies,
    FusedRows,
    GuardedAttention,
    GuardedFeed,
    Selection,
    Store,
)
from fastskip.decoder.fused.riding import Part, riding
from fastskip.decoder.fused.routes import DeviceRoutes, Homes
from fastskip.ops.allocate import copy_over, empty
from fastskip.ops.contracts import ARRIVALS, PAGE, Choice, Pages, Rotation, StepReach, Targets
from fastskip.ops.routes import Route
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.plan.layer_plan import Pool
from fastskip.policy import SkippedKV, Sublayer, TokenClass
from fastskip.routing import Router


@dataclass(frozen=True, slots=True)
class StepShape:
    """How large the steps of one state may be.

    Attributes:
        batch: sequences; a call with fewer leaves the others idle, on a spare page.
        slots: entries of a sequence, and rows of the token history.
        stops: how many tokens end a sequence.
        pad: what a finished sequence yields.
    """

    batch: int
    slots: int
    stops: int
    pad: int


class StepState:
    """Buffers of the decode steps of one plan: counts, positions, page tables, chosen tokens.

    A captured graph reads and writes only these, so it serves every cache that is loaded here.
    """

    def __init__(
        self,
        plan: SkipPlan,
        anchor: Tensor,
        rotation: Rotation | None,
        shape: StepShape,
        routers: Sequence[Router],
    ) -> None:
        self.plan, self.shape, self.anchor = plan, shape, anchor
        device, batch = anchor.device, shape.batch
        self._sets = list(plan.layers_by_table)
        pooled = plan.layers_by_pool
        self._idle = {key: self._idle_pool(layers) for key, layers in pooled.items()}
        self._slabs: dict[Pool, list[Tensor]] = {}
        self._tables: dict[Pool, Tensor] = {}
        new = TokenClass.GENERATED
        grows = [new in plan.layers[layers[0]].holding for layers in plan.layers_by_table.values()]
        steps = torch.tensor(grows or [False], dtype=torch.int32, device=device)
        self.choice = _choice_of(shape, steps)
        self.h = empty((batch, plan.shape.hidden_size), anchor.dtype, device)
        self.sequences = torch.arange(batch, dtype=torch.int32, device=device)
        heads = plan.shape.num_heads
        # Two, since the blocks of a pair count their arrivals in one launch.
        self._arrivals = [_zeros(device, batch * heads) for _ in range(2)]
        self._shared = _zeros(device, ARRIVALS)
        for key in self._idle:
            self._slabs[key] = []
            width = -(-shape.slots // PAGE) + 1
            self._tables[key] = _zeros(device, batch, width, dtype=torch.int64)
        self._pages = {layer.index: self._pages_of(layer) for layer in plan.layers if layer.holding}
        self.store = Store(rotation, self._pages.__getitem__)
        self._rows: dict[tuple[object, ...], FusedRows] = {}
        # 1 for rows of loaded sequences: idle ones run nothing that a router guards.
        self.live, self._no_rows = _zeros(device, batch), _zeros(device, batch)
        # In hollow layers a row leaves an entry where it attends: one flag for both.
        hollow = {
            key: number
            for number, key in enumerate(self._sets)
            if isinstance(key, int) and new in plan.layers[key].hollow
        }
        rows = [self._sets.index(key) for key in plan.hollow_tables]
        self._hollow_rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self.routes: DeviceRoutes | None = None
        self._riding: dict[tuple[int, Part], Route | None] = {}
        if plan.routed:
            self.routes = DeviceRoutes(
                plan,
                routers,
                frozenset({new}),
                lambda classes: self.live if new in classes else self._no_rows,
                self.choice.positions,
                self.sequences,
                self.h,
                Homes(self.choice.grows, hollow),
            )
            self._riding = riding(plan, self.routes, new)
        self.unload()

    def rows_of(self, layer: LayerPlan, is_last: bool) -> FusedRows:
        """What the one row of each sequence enters in a layer; the same in every step."""
        key = layer.row_sets, layer.index % 2, layer.index if self.routes else None
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = self._make_rows(layer)
        return found

    def unload(self) -> None:
        """Makes every sequence idle: steps run (for a capture, say), touch no cache, keep none."""
        self.is_loaded = False
        for key in self._idle:
            self._fill(key, [], [])
        self.choice.counts.zero_()
        self.choice.positions.zero_()
        self.choice.tokens.zero_()
        self.choice.step.zero_()
        self.live.zero_()
        if self.routes is not None:
            self.routes.reset()

    def load(self, cache: PagedCache, tokens: Tensor, stops: Sequence[int]) -> None:
        """Loads a cache whose newest tokens ``[B]`` are to be fed next, without a host sync."""
        self.is_loaded = True
        batch, choice = len(tokens), self.choice
        counts = torch.zeros(choice.counts.shape, dtype=torch.int32)
        if self._sets:
            known = [cache.tables[key].counts for key in self._sets]
            counts[:, :batch] = torch.tensor(known, dtype=torch.int32)
        positions = torch.zeros(self.shape.batch, dtype=torch.int32)
        positions[:batch] = cache.seen.next_places()
        copy_over(counts, choice.counts)
        # The host has only upper bounds for hollow layers; the device has their counts.
        if cache.hollow_counts is not None:
            choice.counts[self._hollow_rows, :batch] = cache.hollow_counts[:, :batch]
        copy_over(positions, choice.positions)
        padded = [*stops, *[-1] * (self.shape.stops - len(stops))]
        copy_over(torch.tensor(padded, dtype=torch.int64), choice.stops)
        for part in (choice.step, choice.tokens, choice.unfinished, self.live):
            part.zero_()
        choice.tokens[:batch] = tokens
        choice.unfinished[:batch] = ~torch.isin(tokens, choice.stops)
        self.live[:batch] = 1
        if self.routes is not None:
            self.routes.reset()
        self.load_pages(cache)

    def held(self, batch: int) -> Tensor | None:
        """``[tables, B]``: 1 where a sequence left an entry in a hollow layer in the step just run;
        tables as in ``plan.hollow_tables``."""
        if not self.plan.hollow_tables:
            return None
        # One launch for all layers, since this is done after every step.
        return self.choice.grows.index_select(0, self._hollow_rows)[:, :batch]

    def load_pages(self, cache: PagedCache) -> None:
        """Loads a cache's page tables: at first, and after the cache has grown."""
        for key in self._idle:
            pool = cache.pools[key]
            self._fill(key, pool.slabs, pool.offsets())

    def _fill(self, key: Pool, slabs: Sequence[Tensor], rows: list[list[int]]) -> None:
        idle, table = self._idle[key], self._tables[key]
        self._slabs[key][:] = [*slabs, *idle.slabs]
        spare = idle.offsets()[0][0]
        host = torch.full(table.shape, spare, dtype=torch.int64)
        for sequence, row in enumerate(rows):
            host[sequence, : len(row)] = torch.tensor(row[: table.shape[1]])
        copy_over(host, table)

    def _idle_pool(self, layers: Sequence[int]) -> PagePool:
        shape = self.plan.shape
        pool = PagePool(self.anchor, 1, layers, shape.num_kv_heads, shape.head_dim)
        pool.reserve([1], 0)
        # Idle sequences attend here; zeros keep their numbers finite.
        pool.slabs[0].zero_()
        return pool

    def _pages_of(self, layer: LayerPlan) -> Pages:
        idle = self._idle[layer.pool]
        return Pages(
            self.anchor,
            self._tables[layer.pool],
            idle.offset_of(layer.index),
            idle.groups,
            idle.head_dim,
            self._slabs[layer.pool],
        )

    def _counts(self, layer: LayerPlan) -> Tensor:
        return self.choice.counts[self._sets.index(layer.table)]

    def _make_rows(self, layer: LayerPlan) -> FusedRows:
        new, batch = TokenClass.GENERATED, self.shape.batch
        every, targets = Selection(slice(0, batch), batch), NO_TARGETS
        if new in layer.holding:
            targets = Targets(self.choice.positions, self.sequences, self._counts(layer))
        attends = new in layer.attending
        projects = new in layer.projecting and not attends
        reach = None
        if attends:
            reach = StepReach(
                self._counts(layer), 1, batch * self.shape.slots, self._arrivals[layer.index % 2]
            )
        rows = FusedRows(
            joint=every if attends else NO_ROWS,
            joint_targets=targets,
            stored=every if projects else NO_ROWS,
            stored_targets=targets,
            copies=tuple(
                Copies(
                    source,
                    self.sequences,
                    self._counts(self.plan.layers[source]),
                    self._counts(layer),
                )
                for source, classes in layer.reusing.items()
                if new in classes
            ),
            attending=every if attends else NO_ROWS,
            feeding=every if new in layer.feeding else NO_ROWS,
            reach=reach,
            arrivals=self._shared,
        )
        return rows if self.routes is None else self._guarded(layer, rows, targets, self.routes)

    def _guarded(
        self, layer: LayerPlan, rows: FusedRows, targets: Targets, routes: DeviceRoutes
    ) -> FusedRows:
        """The rows with the decisions that the layer involves, riding in updates if possible."""
        attends = routes.runs(layer.index, Sublayer.ATTENTION)
        feeds = routes.runs(layer.index, Sublayer.FFN)
        attention = None
        if attends is not None:
            assert rows.reach is not None
            left, copies = self.plan.skipping_cells(layer.index)[TokenClass.GENERATED], []
            if left.kv_source is not None:
                counts = self._counts(self.plan.layers[left.kv_source]), self._counts(layer)
                copies = [Copies(left.kv_source, self.sequences, *counts, attends)]
            is_projected = left.kv is SkippedKV.PROJECT
            attention = GuardedAttention(attends, targets, is_projected, rows.reach, tuple(copies))
        at = {part: self._riding.get((layer.index, part)) for part in Part}
        return replace(
            rows,
            before=at[Part.BEFORE],
            then_attention=at[Part.ATTENTION],
            then_ffn=at[Part.FFN],
            attention=attention,
            ffn=None if feeds is None else GuardedFeed(feeds, at[Part.BETWEEN]),
        )


def _choice_of(shape: StepShape, grows: Tensor) -> Choice:
    """The sampler's state before any sequence is loaded; ``grows [sets]``: 1 where a step adds an
    entry."""
    batch, device = shape.batch, grows.device
    return Choice(
        tokens=_zeros(device, batch, dtype=torch.int64),
        history=_zeros(device, shape.slots, batch, dtype=torch.int64),
        step=_zeros(device, 1),
        unfinished=_zeros(device, batch),
        stops=torch.full((shape.stops,), -1, dtype=torch.int64, device=device),
        pad=shape.pad,
        counts=_zeros(device, len(grows), batch),
        grows=grows[:, None].expand(-1, batch).contiguous(),
        positions=_zeros(device, batch),
    )


def _zeros(device: torch.device, *size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)
