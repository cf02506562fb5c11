"""A prompt under removals on the fused operations: stage by stage, each a smaller forward.

How many rows a removal leaves is known beforehand, which ones only the device knows: the host waits
for that once a removal, and launches the layers of each stage one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from fastskip.decoder.entries import SlotMap
from fastskip.decoder.fused_layer import FusedBlock, run_steps
from fastskip.decoder.fused_parts import Store
from fastskip.decoder.fused_rows import ForwardRows, sender
from fastskip.decoder.layer import Block
from fastskip.decoder.paged_cache import PagedCache
from fastskip.decoder.positions import Positions
from fastskip.decoder.removing import RowsLeft, may_leave
from fastskip.decoder.row_numbers import RowNumbers
from fastskip.decoder.stack import Watch
from fastskip.ops.ranges import span
from fastskip.plan import SkipPlan
from fastskip.routing import Decisions
from fastskip.tokens import TokenLayout


class PagedKeys:
    """The entries of a forward in pages, as a removal asks for them."""

    def __init__(self, plan: SkipPlan, cache: PagedCache, layout: TokenLayout) -> None:
        self._plan, self._cache = plan, cache
        self._slots = SlotMap(plan, cache, layout)
        self.columns = self._slots.columns

    def keys(self, layer: int, sequence: int, count: int) -> Tensor:
        pool = self._cache.pools[self._plan.layers[layer].table]
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
    """One decoder's layers: as fused operations run them, and as scores are computed with."""

    plan: SkipPlan
    fused: Sequence[FusedBlock]
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
        h = self.positions.embed(layout.pack(h), layout.positions)
        late = None if wanted is None else layout.locate(wanted)
        if late is not None and not may_leave(plan, layout, late):
            late = None
        keeps_gone = watch is not None or wanted is None or late is not None
        turns = self.positions.turns(layout.positions, h)
        rest = RowsLeft(plan, self.blocks, layout, turns, keys, keeps_gone=keeps_gone)
        store = Store(self.positions.rotation(layout.positions_needed, h), cache.pages_of)

        def look(layer: int, rows: Tensor) -> None:
            rest.look(layer, rows)
            if watch is not None:
                watch(layer, rest.whole(rows))

        with span("decoder"):
            for stage, steps in groupby(plan.steps, lambda step: plan.layers[step[0]].stage):
                own = list(steps)
                narrow = None
                if wanted is not None and late is None:
                    narrow = rest.layout.locate(wanted)
                numbers = RowNumbers(rest.layout, cache.codes_at(stage), narrow)
                send = sender(numbers, cache.anchor.device)
                rows = ForwardRows(plan, numbers, send, {}, (), cache.anchor)
                h = run_steps(plan, self.fused, h, rows.of, store, look, own)
                h = rest.remove(own[-1][-1], h)
        cache.commit(layout, left=keys.left)
        if record is not None:
            record(rest.decisions(plan))
        if wanted is not None and late is None:
            return h
        return rest.whole(h) if late is None else late.take(rest.whole(h))
