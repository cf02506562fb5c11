"""The rows, targets and reaches of one forward on the fused operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastskip.decoder.device_routes import DeviceRoutes
from fastskip.decoder.fused_parts import (
    Copies,
    FusedRows,
    GuardedAttention,
    GuardedFeed,
    Placing,
    Selection,
)
from fastskip.decoder.guards import Point
from fastskip.decoder.paged_cache import PagedCache
from fastskip.ops.contracts import Reach, Targets
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import SkippedKV, Sublayer, TokenClass
from fastskip.routing import Router
from fastskip.tokens import CODES, Rows, TokenLayout, member

Classes = frozenset[TokenClass]


class ForwardRows:
    """Makes the ``FusedRows`` of a forward; layers that do the same share them.

    Everything is worked out on the host from the layout and sent to the device once; ``narrow``
    are the rows that go on after the last layer's entries.
    """

    def __init__(
        self,
        plan: SkipPlan,
        layout: TokenLayout,
        cache: PagedCache,
        narrow: Rows | None,
        routers: Sequence[Router] = (),
    ) -> None:
        self._plan, self._layout, self._cache = plan, layout, cache
        self._device = cache.anchor.device
        self._codes = torch.cat((cache.codes, layout.source), dim=1)
        self._narrow = narrow
        self._made: dict[tuple[object, ...], FusedRows] = {}
        self._seen: dict[Classes, Tensor] = {}
        self._targets: dict[tuple[Classes, Classes], Targets] = {}
        self._nothing = self._send_targets(*[torch.empty(0, dtype=torch.int64)] * 3)
        self._selections: dict[Classes, Selection] = {}
        self._flags: dict[Classes, Tensor] = {}
        self.held: dict[int, Tensor] = {}
        self.routes: DeviceRoutes | None = None
        if plan.routed:
            self._every = Rows(slice(0, len(layout)), len(layout))
            # Sent once: each of these is a copy that waits for the device.
            self._routes_positions = self._to_device(layout.positions)
            self._routes_sequences = self._to_device(layout.sequences)
            self._all_slots: dict[tuple[Classes, Classes], Tensor] = {}
            self._reaches: dict[tuple[Classes, Classes, bool], Reach] = {}
            self._order: tuple[Tensor, tuple[int, ...]] | None = None
            self.routes = DeviceRoutes(
                plan,
                routers,
                frozenset(plan.classes),
                self._flags_of,
                self._routes_positions,
                self._routes_sequences,
                cache.anchor,
            )

    def of(self, layer: LayerPlan, is_last: bool) -> FusedRows:
        rows = self._static(layer, is_last)
        return rows if self.routes is None else self._guarded(layer, rows, self.routes)

    def _guarded(self, layer: LayerPlan, rows: FusedRows, routes: DeviceRoutes) -> FusedRows:
        """The rows with what is decided on the way."""
        step = next(step for step in self._plan.steps if layer.index in step)
        before = routes.route(step, Point.START) if layer.index == step[0] else None
        attends = routes.runs(layer.index, Sublayer.ATTENTION)
        feeds = routes.runs(layer.index, Sublayer.FFN)
        return replace(
            rows,
            before=before,
            attention=None if attends is None else self._attention(layer, rows, attends),
            ffn=None if feeds is None else GuardedFeed(feeds, routes.route(step, Point.MIDDLE)),
        )

    def _attention(self, layer: LayerPlan, rows: FusedRows, runs: Tensor) -> GuardedAttention:
        leaves = _kv_by_class(self._plan, layer)
        reused = frozenset(c for c, kv in leaves.items() if kv is SkippedKV.REUSE)
        projected = (layer.attending | layer.projecting) if not layer.hollow else frozenset()
        slots = self._masked_slots(layer.holding, projected)
        targets = Targets(self._routes_positions, self._routes_sequences, slots)
        copies = tuple(
            Copies(
                source,
                targets.sequences,
                self._masked_slots(self._plan.layers[source].holding, classes),
                self._masked_slots(layer.holding, classes),
                runs,
            )
            for source, classes in _sources(self._plan, layer, reused).items()
        )
        return GuardedAttention(
            runs,
            targets,
            SkippedKV.PROJECT in leaves.values(),
            self._guarded_reach(layer, is_narrow=rows.narrow is not None),
            copies,
            self._placing(layer) if layer.hollow else None,
        )

    def _guarded_reach(self, layer: LayerPlan, *, is_narrow: bool) -> Reach:
        """What rows that may attend see; queries lie in the order of the rows that go on."""
        key = layer.holding, layer.attending, is_narrow
        found = self._reaches.get(key)
        if found is None:
            found = self._reaches[key] = self._make_guarded_reach(layer, is_narrow)
        return found

    def _make_guarded_reach(self, layer: LayerPlan, is_narrow: bool) -> Reach:
        going_on = self._every
        if is_narrow:
            assert self._narrow is not None
            going_on = self._narrow
        layout, holding = self._layout, layer.holding
        sequences, columns = (going_on.take(t) for t in (layout.sequences, layout.columns))
        may = member(going_on.take(layout.codes), layer.attending).nonzero().squeeze(1)
        order = may[torch.argsort(sequences[may] * self._codes.shape[1] + columns[may])]
        counts = torch.bincount(sequences[may], minlength=layout.batch)
        limits = self._limits(holding, going_on)
        bounds = (0, *counts.cumsum(0).tolist())
        return Reach(self._to_device(limits), self._to_device(order), bounds)

    def _placing(self, layer: LayerPlan) -> Placing:
        layout, index = self._layout, layer.index
        if self._order is None:
            order = torch.argsort(layout.sequences * self._codes.shape[1] + layout.columns)
            counts = torch.bincount(layout.sequences, minlength=layout.batch)
            self._order = self._to_device(order), (0, *counts.cumsum(0).tolist())
        stored = layer.holding - layer.hollow
        return Placing(
            self._flags_of(stored) if stored else None,
            *self._order,
            self._cache.device_counts[index],
            partial(self.held.__setitem__, index),
        )

    def _masked_slots(self, holding: Classes, classes: Classes) -> Tensor:
        """Slots ``[N]`` of rows of some classes on the device; -1 for the others."""
        found = self._all_slots.get((holding, classes))
        if found is None:
            slots = self._slots(holding, self._every)
            slots = slots.masked_fill(~member(self._layout.codes, classes), -1)
            found = self._all_slots[holding, classes] = self._to_device(slots)
        return found

    def _flags_of(self, classes: Classes) -> Tensor:
        found = self._flags.get(classes)
        if found is None:
            flags = member(self._layout.codes, classes)
            found = self._flags[classes] = self._to_device(flags)
        return found

    def _static(self, layer: LayerPlan, is_last: bool) -> FusedRows:
        narrow = self._narrow if is_last else None
        key = (layer.row_sets, narrow is not None)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(layer, narrow)
        return found

    def _make(self, layer: LayerPlan, narrow: Rows | None) -> FusedRows:
        nobody: Classes = frozenset()
        joint = layer.attending if narrow is None else nobody
        stored = layer.projecting - joint
        attending = self._going_on(layer.attending, narrow)
        rows = self._layout.rows(layer.attending)
        if narrow is not None:
            rows = _within(narrow, attending)
        return FusedRows(
            joint=self._select(joint),
            joint_targets=self._targets_of(layer.holding, joint),
            stored=self._select(stored),
            stored_targets=self._targets_of(layer.holding, stored),
            copies=tuple(
                self._copies(source, classes, layer)
                for source, classes in layer.reusing.items()
                if self._layout.rows(classes).count
            ),
            narrow=None if narrow is None else self._send(narrow),
            attending=self._select(joint) if narrow is None else self._send(attending),
            query_targets=self._nothing if narrow is None else self._query_targets(rows),
            feeding=self._feeding(layer, narrow),
            reach=self._reach(layer.holding, rows) if attending.count else None,
        )

    def _feeding(self, layer: LayerPlan, narrow: Rows | None) -> Selection:
        if narrow is None:
            return self._select(layer.feeding)
        return self._send(self._going_on(layer.feeding, narrow))

    def _going_on(self, classes: Classes, narrow: Rows | None) -> Rows:
        """The rows of some classes among those that go on, indexing those."""
        if narrow is None:
            return self._layout.rows(classes)
        codes = narrow.take(self._layout.codes)
        wanted = torch.tensor(sorted(CODES[token_class] for token_class in classes))
        index = torch.isin(codes, wanted).nonzero().squeeze(1)
        if len(index) == len(codes):
            return Rows(slice(0, len(codes)), len(codes))
        return Rows(index, len(index))

    def _select(self, classes: Classes) -> Selection:
        found = self._selections.get(classes)
        if found is None:
            found = self._selections[classes] = self._send(self._layout.rows(classes))
        return found

    def _send(self, rows: Rows) -> Selection:
        if isinstance(rows.index, slice):
            return Selection(rows.index, rows.count)
        return Selection(slice(0, 0), rows.count, self._to_device(rows.index))

    def _targets_of(self, holding: Classes, classes: Classes) -> Targets:
        rows = self._layout.rows(classes)
        if not rows.count:
            return self._nothing
        found = self._targets.get((holding, classes))
        if found is None:
            sequences = rows.take(self._layout.sequences)
            found = self._targets[holding, classes] = self._send_targets(
                rows.take(self._layout.positions), sequences, self._slots(holding, rows)
            )
        return found

    def _query_targets(self, rows: Rows) -> Targets:
        """Of queries that leave no entry: only their positions matter."""
        positions = rows.take(self._layout.positions)
        sequences = rows.take(self._layout.sequences)
        return self._send_targets(positions, sequences, torch.full_like(positions, -1))

    def _send_targets(self, positions: Tensor, sequences: Tensor, slots: Tensor) -> Targets:
        return Targets(*map(self._to_device, (positions, sequences, slots)))

    def _copies(self, source: int, classes: Classes, layer: LayerPlan) -> Copies:
        rows = self._layout.rows(classes)
        return Copies(
            source,
            self._to_device(rows.take(self._layout.sequences)),
            self._to_device(self._slots(self._plan.layers[source].holding, rows)),
            self._to_device(self._slots(layer.holding, rows)),
        )

    def _slots(self, holding: Classes, rows: Rows) -> Tensor:
        return self._limits(holding, rows) - 1

    def _limits(self, holding: Classes, rows: Rows) -> Tensor:
        """How many entries lie at or before each row's column: what it sees, itself included."""
        seen = self._seen.get(holding)
        if seen is None:
            seen = self._seen[holding] = member(self._codes, holding).cumsum(1)
        return seen[rows.take(self._layout.sequences), rows.take(self._layout.columns)]

    def _reach(self, holding: Classes, rows: Rows) -> Reach:
        sequences, columns = (rows.take(t) for t in (self._layout.sequences, self._layout.columns))
        order = torch.argsort(sequences * self._codes.shape[1] + columns)
        counts = torch.bincount(sequences, minlength=self._layout.batch)
        bounds = (0, *counts.cumsum(0).tolist())
        limits = self._limits(holding, rows)
        is_whole = torch.equal(self._seen[holding][:, -1], counts)
        return Reach(self._to_device(limits), self._to_device(order), bounds, is_whole)

    def _to_device(self, numbers: Tensor) -> Tensor:
        return numbers.to(torch.int32).to(self._device)


def _kv_by_class(plan: SkipPlan, layer: LayerPlan) -> dict[TokenClass, SkippedKV]:
    """What a row of each class leaves if it skips a layer's attention, where it may."""
    found = {c: cell.kv for c, cell in layer.cells.items() if cell.kv is not None}
    for cell in plan.routed_by_layer.get(layer.index, ()):
        if Sublayer.ATTENTION in cell.skip and cell.skipped.kv is not None:
            found[cell.token_class] = cell.skipped.kv
    return found


def _sources(
    plan: SkipPlan, layer: LayerPlan, classes: Classes
) -> dict[int, frozenset[TokenClass]]:
    """Which lower layer each of some classes copies its entries from."""
    found: dict[int, frozenset[TokenClass]] = {}
    for token_class in sorted(classes):
        source = plan.kv_sources(layer.index, token_class)[0]
        found[source] = found.get(source, frozenset()) | {token_class}
    return found


def _within(outer: Rows, inner: Rows) -> Rows:
    """``inner`` indexes what ``outer`` took: the same rows, indexing the whole."""
    index = inner.take(outer.ids(torch.device("cpu")))
    return Rows(index, len(index))
