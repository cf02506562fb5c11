"""The rows of one forward; where routers decide, they are chosen on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

from torch import Tensor

from fastskip.decoder.fused.parts import Copies, FusedRows, GuardedAttention, GuardedFeed, Placing
from fastskip.decoder.fused.routes import DeviceRoutes
from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.fused.rows import Send, StaticRows
from fastskip.decoder.guards import Classes, Point
from fastskip.ops.contracts import Bounds, Reach, Targets
from fastskip.plan import Cell, LayerPlan, SkipPlan
from fastskip.plan.layer_plan import Table
from fastskip.policy import SkippedKV, Sublayer, TokenClass
from fastskip.routing import Router


class ForwardRows(StaticRows):
    """Makes the ``FusedRows`` of a forward: layers that routers decide on get flags of all rows,
    where others get the rows themselves.

    Attributes:
        routes: the decisions on the device; ``None`` without routers.
        held: the rows with entries in each hollow layer, ``[N]``, filled by a run.
    """

    def __init__(
        self,
        plan: SkipPlan,
        numbers: RowNumbers,
        send: Send,
        counts: Mapping[Table, Tensor],
        routers: Sequence[Router],
        like: Tensor,
    ) -> None:
        """``counts``: of each hollow table on the device, ``[B]``, which a run updates; ``like``:
        gives dtype and device of rows."""
        super().__init__(plan, numbers, send, like.device)
        self._counts = counts
        self._flags: dict[Classes, Tensor] = {}
        self._slots: dict[tuple[Classes, Classes], Tensor] = {}
        self._reaches: dict[tuple[Classes, Classes, bool], Reach] = {}
        self._order: tuple[Tensor, Bounds] | None = None
        self.held: dict[int, Tensor] = {}
        self.routes: DeviceRoutes | None = None
        if plan.routed:
            self.routes = DeviceRoutes(
                plan,
                routers,
                frozenset(plan.classes),
                self._flags_of,
                self._positions,
                self._sequences,
                like,
            )

    @cached_property
    def _positions(self) -> Tensor:
        return self._send(lambda n: n.positions(n.every()))

    @cached_property
    def _sequences(self) -> Tensor:
        return self._send(lambda n: n.sequences(n.every()))

    def of(self, layer: LayerPlan, is_last: bool) -> FusedRows:
        """What enters the parts of a layer; ``is_last``: it is in the plan's last step."""
        routes, is_narrow = self.routes, self._is_narrow(is_last)
        if routes is None:
            return self._static(layer, is_narrow)
        step = next(step for step in self._plan.steps if layer.index in step)
        before = routes.route(step, Point.START) if layer.index == step[0] else None
        attends = routes.runs(layer.index, Sublayer.ATTENTION)
        feeds = routes.runs(layer.index, Sublayer.FFN)
        if attends is None or feeds is None:
            rows = self._static(layer, is_narrow)
        else:
            # Both sublayers are guarded, so only the narrowing matters.
            rows = FusedRows(narrow=self._narrow if is_narrow else None)
        return replace(
            rows,
            before=before,
            attention=None if attends is None else self._attention(layer, rows, attends),
            ffn=None if feeds is None else GuardedFeed(feeds, routes.route(step, Point.MIDDLE)),
        )

    def _attention(self, layer: LayerPlan, rows: FusedRows, runs: Tensor) -> GuardedAttention:
        left = self._plan.skipping_cells(layer.index)
        projected = (layer.attending | layer.projecting) if not layer.hollow else frozenset()
        slots = self._masked_slots(layer.holding, projected)
        targets = Targets(self._positions, self._sequences, slots)
        copies = tuple(
            Copies(
                source,
                targets.sequences,
                self._masked_slots(self._plan.layers[source].holding, classes),
                self._masked_slots(layer.holding, classes),
                runs,
            )
            for source, classes in _reusing(left).items()
        )
        return GuardedAttention(
            runs,
            targets,
            any(cell.kv is SkippedKV.PROJECT for cell in left.values()),
            self._guarded_reach(layer, is_narrow=rows.narrow is not None),
            copies,
            self._placing(layer) if layer.hollow else None,
        )

    def _guarded_reach(self, layer: LayerPlan, *, is_narrow: bool) -> Reach:
        """What rows that may attend see; queries are in the order of the rows that continue."""
        key = layer.holding, layer.attending, is_narrow
        found = self._reaches.get(key)
        if found is None:
            queries = RowNumbers.continuing_rows if is_narrow else RowNumbers.every
            found = self._reaches[key] = self._reach(layer.holding, layer.attending, queries)
        return found

    def _placing(self, layer: LayerPlan) -> Placing:
        index, every = layer.index, frozenset(TokenClass)
        if self._order is None:
            self._order = self._sort(every, RowNumbers.every)
        stored = layer.holding - layer.hollow
        return Placing(
            self._flags_of(stored) if stored else None,
            *self._order,
            self._counts[index],
            partial(self.held.__setitem__, index),
        )

    def _masked_slots(self, holding: Classes, classes: Classes) -> Tensor:
        """Slots ``[N]`` of rows of some classes on the device; -1 for the others."""
        found = self._slots.get((holding, classes))
        if found is None:
            found = self._send(lambda n: n.masked_slots(holding, classes))
            self._slots[holding, classes] = found
        return found

    def _flags_of(self, classes: Classes) -> Tensor:
        found = self._flags.get(classes)
        if found is None:
            found = self._flags[classes] = self._send(lambda n: n.flags(classes))
        return found


def _reusing(cells: Mapping[TokenClass, Cell]) -> dict[int, Classes]:
    """By lower layer: the classes whose rows copy their entries from it."""
    found: dict[int, Classes] = {}
    for token_class, cell in cells.items():
        if cell.kv_source is not None:
            found[cell.kv_source] = found.get(cell.kv_source, frozenset()) | {token_class}
    return found
