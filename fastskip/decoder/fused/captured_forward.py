"""Prompts as CUDA graphs: one launch for all layers, however busy the host is.

A 7B model's prompt takes some three hundred launches of tens of microseconds each, about as long as
the host needs to issue them. A graph is captured for a shape of forward: how many rows each class
has, rounded up with idle rows. Where the rows lie, what they see and which pages hold their entries
is read from device memory, so a graph serves every forward of its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.deep_features import PlacedFeatures
from fastskip.decoder.fused.counted_layer import SwitchBlock
from fastskip.decoder.fused.device_numbers import DeviceNumbers
from fastskip.decoder.fused.forward_rows import ForwardRows
from fastskip.decoder.fused.kept_graphs import Graphs
from fastskip.decoder.fused.layer import FusedBlock
from fastskip.decoder.fused.paged_cache import PagedCache, aligned_counts
from fastskip.decoder.fused.parts import Store
from fastskip.decoder.fused.routes import DeviceRoutes
from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.fused.sizes import power_of_two, rounded_rows
from fastskip.decoder.fused.steps import run_steps
from fastskip.decoder.positions import Positions
from fastskip.ops.allocate import copy_over, empty
from fastskip.ops.contracts import Rotation
from fastskip.ops.graph_nodes import can_switch
from fastskip.ops.graphs import capture
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Pool
from fastskip.routing import Router

MOST_ROWS = 8192
"""Of a captured forward: with more, the host keeps ahead of the device anyway."""
KEPT = 16
"""Graphs kept; they share the memory of their activations."""
PAGES = 16
"""Minimum columns of a page table, so that all calls of up to 1024 tokens have the same."""
SEEN = 256
"""Shapes without a graph that are remembered."""


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """What a captured forward has baked in.

    Attributes:
        batch: sequences.
        bounds: of the layout's groups, in rows.
        narrow: codes of the rows that continue after the last layer's entries; ``None``: all.
        read: how many rows are read, where all continue; ``None``: all.
        pages: columns of the page tables.
        positions: rows of the RoPE tables.
        stage: which of the plan's stages it runs.
        featured: how many rows get features after the first layers, rounded up.
    """

    batch: int
    bounds: tuple[int, ...]
    narrow: tuple[int, ...] | None
    read: int | None
    pages: int
    positions: int
    stage: int = 0
    featured: int = 0

    @classmethod
    def of(
        cls, numbers: RowNumbers, cache: PagedCache, max_positions: int, stage: int = 0
    ) -> ForwardShape:
        layout, narrow = numbers.layout, numbers.narrow
        return cls(
            layout.batch,
            layout.bounds,
            None if narrow is None else tuple(narrow.take(layout.codes).tolist()),
            None if numbers.read is None else numbers.read.count,
            power_of_two(max([PAGES, *(cache.pools[key].width for key in _pools(cache, stage))])),
            power_of_two(max(layout.positions_needed, max_positions)),
            stage,
            0 if numbers.features is None else rounded_rows(len(numbers.features.rows)),
        )


@dataclass(frozen=True, slots=True)
class Layers:
    """What a decoder runs under one plan."""

    plan: SkipPlan
    blocks: Sequence[FusedBlock]
    positions: Positions
    routers: Sequence[Router]


class CapturedForward:
    """One forward through the layers of a stage (all layers, without removals), at fixed
    addresses."""

    def __init__(
        self,
        layers: Layers,
        shape: ForwardShape,
        h: Tensor,
        numbers: RowNumbers,
        cache: PagedCache,
        pool: Any,
    ) -> None:
        """``h``, ``numbers``, ``cache``: those of the first ``run``, which comes next.
        ``pool``: the memory of graphs that never run at the same time."""
        self._layers, plan, anchor = layers, layers.plan, cache.anchor
        device = anchor.device
        self._stage, self._steps = shape.stage, plan.stages[shape.stage]
        self._asked = plan.removal_layer(shape.stage)
        self._entered: Tensor | None = None
        self._h = empty((len(numbers.layout), h.shape[-1]), anchor.dtype, device)
        keys = _pools(cache, shape.stage)
        self._all_tables = torch.zeros(
            len(keys), shape.batch, shape.pages, dtype=torch.int64, device=device
        )
        self._tables = dict(zip(keys, self._all_tables, strict=True))
        # Counts of hollow tables: as a run finds them, and as it updates them.
        hollow = len(cache.device_counts)
        self._begun, self._reached = (aligned_counts(hollow, shape.batch, device) for _ in range(2))
        self._counts = {
            key: own[: shape.batch]
            for key, own in zip(cache.device_counts, self._reached, strict=True)
        }
        parcel = self._parcel = DeviceNumbers(numbers, device)
        self._columns = parcel.send(RowNumbers.packed if self._stage else RowNumbers.columns)
        self._read = None if numbers.read is None else parcel.send(RowNumbers.reading)
        self._positions = parcel.send(lambda n: n.positions(n.every()))
        self._rows = ForwardRows(plan, numbers, parcel.send, self._counts, layers.routers, anchor)
        # All up front: nothing may be sent during a capture.
        self._rows_of = {
            index: self._rows.of(plan.layers[index], step is plan.steps[-1])
            for step in self._steps
            for index in step
        }
        # Without slabs, which kernels do not read: none is kept alive.
        pages = {
            layer.index: replace(
                cache.pages_of(layer.index), table=self._tables[layer.pool], slabs=()
            )
            for layer in plan.layers
            if layer.holding and layer.stage == self._stage
        }
        has_axes, self._needed = layers.positions.has_axes, shape.positions
        self._axes = parcel.send(RowNumbers.axes).view(3, -1) if has_axes else None
        self._rotation = self._tabulate()
        self._store = Store(self._rotation, pages.__getitem__)
        self._features = self._room_for(numbers.features, shape.featured)
        self._out = self._h
        self._load(h, numbers, cache)
        self._replay = capture(self._work, device, pool)

    @property
    def routes(self) -> DeviceRoutes | None:
        """The decisions of the last run."""
        return self._rows.routes

    @property
    def held(self) -> dict[int, Tensor]:
        """Which rows left an entry in each hollow layer in the last run, ``[N]``."""
        return self._rows.held

    @property
    def entered(self) -> Tensor | None:
        """The input of the stage's last layer in the last run, if a removal needs it: ``[N, D]``,
        idle rows included; the next run overwrites it."""
        return self._entered

    def run(self, h: Tensor, numbers: RowNumbers, cache: PagedCache) -> Tensor:
        """Runs the layers on ``h [B, T, D]``, in later stages on packed rows ``[n, D]``, which is
        not written; returns the rows that are read, ``[n, D]``."""
        self._parcel.load(numbers)
        self._load(h, numbers, cache)
        self._replay()
        if cache.hollow_counts is not None:
            cache.hollow_counts.copy_(self._reached)
        if self._read is not None:
            return self._out.index_select(0, self._read)
        out = self._out if numbers.narrow is not None else numbers.layout.real(self._out)
        # The next run writes to the same memory.
        return out.clone() if out is self._out else out

    def _tabulate(self) -> Rotation | None:
        return self._layers.positions.rotation(self._needed, self._h, self._axes)

    def _room_for(self, features: PlacedFeatures | None, count: int) -> PlacedFeatures | None:
        """Buffers for the features of the stage's layers, the same in all runs."""
        if features is None:
            return None
        rows = self._parcel.send(lambda numbers: numbers.featured(count))
        of_layers = {
            layer: self._h.new_zeros(count, self._h.shape[1])
            for step in self._steps
            for layer in step
            if layer in features.of_layers
        }
        return PlacedFeatures(of_layers, rows)

    def _load(self, h: Tensor, numbers: RowNumbers, cache: PagedCache) -> None:
        if self._axes is not None:
            new = self._tabulate()
            assert new is not None and self._rotation is not None
            self._rotation.cosine.copy_(new.cosine)
            self._rotation.sine.copy_(new.sine)
        rows = h.flatten(0, -2).index_select(0, self._columns)
        if not self._stage:
            rows = self._layers.positions.embed(rows, self._positions)
        self._h.copy_(rows)
        if self._features is not None and numbers.features is not None:
            for layer, room in self._features.of_layers.items():
                own = numbers.features.of_layers[layer]
                room[: len(own)].copy_(own)
                room[len(own) :].zero_()
        width = self._all_tables.shape[2]
        tables = [cache.pools[key].rows(width) for key in self._tables]
        if tables:
            copy_over(torch.tensor(tables, dtype=torch.int64), self._all_tables)
        if cache.hollow_counts is not None:
            self._begun.copy_(cache.hollow_counts)

    def _work(self) -> None:
        # A capture runs this several times, each time from the same state.
        self._reached.copy_(self._begun)
        if self._rows.routes is not None:
            self._rows.routes.reset()
        layers, rows = self._layers, self._rows_of
        self._out = run_steps(
            layers.plan,
            layers.blocks,
            self._h,
            lambda layer, _: rows[layer.index],
            self._store,
            steps=self._steps,
            features=self._features,
            note=None if self._asked is None else self._note,
        ).h

    def _note(self, layer: int, h: Tensor) -> None:
        if layer == self._asked:
            self._entered = h.clone()


def _pools(cache: PagedCache, stage: int) -> list[Pool]:
    """The pools that hold the entries of a stage's layers."""
    return [key for key in cache.pools if key.stage == stage]


class CapturedForwards(Graphs[ForwardShape, CapturedForward]):
    """The captured forwards of one decoder.

    A shape gets a graph the second time it occurs, or later if the graph evicts another: similar
    prompts share a few shapes, and a capture takes as long as several prompts.

    ``switches`` may be set at any time: whether sublayers that routers decide on become bodies of
    SWITCH nodes (``SwitchBlock``); ``None``: if the device and the bindings support them.
    """

    def __init__(self, switches: bool | None = None) -> None:
        super().__init__(KEPT, SEEN)
        self.switches = switches

    def blocks(
        self, blocks: Sequence[FusedBlock], plan: SkipPlan, device: torch.device
    ) -> Sequence[FusedBlock]:
        """The layers of a plan as graphs run them."""
        does_switch = can_switch(device) if self.switches is None else self.switches
        if not plan.routed or not does_switch:
            return blocks
        bodies = self.bodies(device)
        return [SwitchBlock.of(block, bodies) for block in blocks]
