"""The rows, targets and reaches of one forward on the fused operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fastskip.decoder.fused_layer import Copies, FusedRows, Selection
from fastskip.decoder.paged_cache import PagedCache
from fastskip.ops.contracts import Reach, Targets
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import TokenClass
from fastskip.tokens import CODES, Rows, TokenLayout, member

Classes = frozenset[TokenClass]


class ForwardRows:
    """Makes the ``FusedRows`` of a forward; layers that do the same share them.

    Everything is worked out on the host from the layout and sent to the device once; ``narrow``
    are the rows that go on after the last layer's entries.
    """

    def __init__(
        self, plan: SkipPlan, layout: TokenLayout, cache: PagedCache, narrow: Rows | None
    ) -> None:
        self._plan, self._layout = plan, layout
        self._device = cache.anchor.device
        self._codes = torch.cat((cache.codes, layout.source), dim=1)
        self._narrow = narrow
        self._made: dict[tuple[object, ...], FusedRows] = {}
        self._seen: dict[Classes, Tensor] = {}
        self._targets: dict[tuple[Classes, Classes], Targets] = {}
        self._nothing = self._send_targets(*[torch.empty(0, dtype=torch.int64)] * 3)
        self._selections: dict[Classes, Selection] = {}

    def of(self, layer: LayerPlan, is_last: bool) -> FusedRows:
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


def _within(outer: Rows, inner: Rows) -> Rows:
    """``inner`` indexes what ``outer`` took: the same rows, indexing the whole."""
    index = inner.take(outer.ids(torch.device("cpu")))
    return Rows(index, len(index))
