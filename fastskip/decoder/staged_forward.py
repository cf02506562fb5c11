"""A prompt under removals on the fused operations: stage by stage, each a smaller forward.

How many rows a removal leaves is known beforehand, which ones only the device knows: the host waits
for that once a removal. Each stage is a forward of its own, captured like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastskip.decoder.entries import SlotMap
from fastskip.decoder.layer import Block
from fastskip.decoder.paged_cache import PagedCache
from fastskip.decoder.positions import Positions
from fastskip.decoder.removing import RowsLeft, may_leave
from fastskip.decoder.stack import Watch
from fastskip.plan import SkipPlan
from fastskip.routing import Decisions
from fastskip.tokens import TokenLayout


class RunStage(Protocol):
    """Runs the layers of one stage."""

    def __call__(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: PagedCache,
        wanted: Tensor | None,
        watch: Watch | None,
        stage: int,
    ) -> tuple[Tensor, Tensor | None]:
        """``h``: columns ``[B, T, D]``, in later stages rows ``[N, D]``. Returns the rows that go
        on, and what entered the last layer, ``[N, D]``, if a removal comes after it."""


class PagedKeys:
    """The entries of a forward in pages, as a removal asks for them."""

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
    """One decoder's layers: how stages run, and what scores are computed with."""

    plan: SkipPlan
    run_stage: RunStage
    blocks: Sequence[Block]
    positions: Positions

    def run(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: PagedCache,
        wanted: Tensor | None,
        watch: Watch | None,
        record: Callable[[Decisions], object] | None,
    ) -> Tensor:
        """As ``Decoder.run``; the cache has room for ``layout``, and counts its columns."""
        plan, keys = self.plan, PagedKeys(self.plan, cache, layout)
        late = None if wanted is None else layout.locate(wanted)
        if late is not None and not may_leave(plan, layout, late):
            late = None
        keeps_gone = watch is not None or wanted is None or late is not None
        turns = self.positions.turns(layout, cache.anchor)
        rest = RowsLeft(plan, self.blocks, layout, turns, keys, keeps_gone=keeps_gone)

        def see(layer: int, rows: Tensor) -> None:
            assert watch is not None
            watch(layer, rest.whole(rows))

        for stage, steps in enumerate(plan.stages):
            last = steps[-1][-1]
            goes_on = None if late is not None else wanted
            seen = None if watch is None else see
            h, entered = self.run_stage(h, rest.layout, cache, goes_on, seen, stage)
            if entered is not None:
                rest.look(last, entered)
                h = rest.remove(last, h)
        cache.commit(layout, left=keys.left)
        if record is not None:
            record(rest.decisions(plan))
        if wanted is not None and late is None:
            return h
        return rest.whole(h) if late is None else late.take(rest.whole(h))
