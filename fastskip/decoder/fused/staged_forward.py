"""A prompt under removals on the fused operations: stage by stage, each a smaller forward.

How many rows a removal leaves is known in advance; which ones, only the device knows, so each
removal takes one host sync. Each stage is a separate forward, captured like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.routes import DeviceRoutes
from fastskip.decoder.layer import Block
from fastskip.decoder.plain_forward import ForwardOptions
from fastskip.decoder.positions import Positions
from fastskip.decoder.removing import RemainingRows, may_leave
from fastskip.decoder.slot_map import SlotMap
from fastskip.plan import SkipPlan
from fastskip.routing import Decisions
from fastskip.tokens import TokenLayout


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of one stage on the rows of ``layout``: ``out``, the rows that continue; ``held``,
    the rows with an entry in each hollow layer ``[N]``; ``routes``, the decisions on the device;
    ``entered``, the last layer's input ``[N, D]`` without idle rows, if a removal follows it."""

    out: Tensor
    layout: TokenLayout
    held: Mapping[int, Tensor]
    routes: DeviceRoutes | None
    entered: Tensor | None


RunStage = Callable[[Tensor, TokenLayout, ForwardOptions, int], Ran]
"""Runs the layers of one stage. Takes columns ``[B, T, D]``, in later stages rows ``[N, D]``, their
layout, the options and the stage."""


class PagedKeys:
    """The entries of a forward in pages, as a removal reads them."""

    def __init__(self, plan: SkipPlan, cache: PagedCache, layout: TokenLayout) -> None:
        self._plan, self._cache = plan, cache
        self._slots = SlotMap(plan, cache, layout)
        self.columns = self._slots.columns

    def keys(self, layer: int, sequence: int, count: int) -> Tensor:
        pool = self._cache.pools[self._plan.layers[layer].pool]
        return pool.keys(layer, sequence, count)

    def past(self, layer: int, sequence: int) -> Tensor | None:
        count = self._cache.tables[self._plan.layers[layer].table].counts[sequence]
        return self.keys(layer, sequence, count) if count else None

    def enter(self, layout: TokenLayout) -> None:
        self._cache.enter(len(self._slots.stages), layout, self._cache.anchor)
        self._slots.stages.append(layout)

    @property
    def left(self) -> Sequence[TokenLayout]:
        return self._slots.stages[1:]


@dataclass(frozen=True, slots=True)
class StagedForward:
    """One decoder's layers: how to run a stage, and what to compute scores with."""

    plan: SkipPlan
    run_stage: RunStage
    blocks: Sequence[Block]
    positions: Positions

    def run(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: PagedCache,
        options: ForwardOptions,
        record: Callable[[Decisions], object] | None,
    ) -> Tensor:
        """Like ``Decoder.run``; the cache has room for ``layout``, and counts its columns."""
        plan, keys = self.plan, PagedKeys(self.plan, cache, layout)
        wanted, watch = options.wanted, options.watch
        late = None if wanted is None else layout.locate(wanted)
        if late is not None and not may_leave(plan, layout, late):
            late = None
        keeps_gone = watch is not None or wanted is None or late is not None
        turns = self.positions.turns(layout, cache.anchor)
        rest = RemainingRows(plan, self.blocks, layout, turns, keys, keeps_gone=keeps_gone)

        def see(layer: int, rows: Tensor) -> None:
            assert watch is not None
            watch(layer, rest.whole(rows))

        options = replace(
            options,
            wanted=wanted if late is None else None,
            watch=None if watch is None else see,
        )
        for stage, steps in enumerate(plan.stages):
            last = steps[-1][-1]
            ran = self.run_stage(h, rest.layout, options, stage)
            h = ran.out
            if ran.entered is not None:
                rest.look(last, ran.entered)
                h = rest.remove(last, h)
        cache.commit(layout, left=keys.left)
        if record is not None:
            record(rest.decisions(plan))
        if wanted is not None and late is None:
            return h
        return rest.whole(h) if late is None else late.take(rest.whole(h))
