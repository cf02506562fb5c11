"""The rows, targets and reaches of a forward's layers in which no router decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastskip.decoder.fused.parts import (
    NO_TARGETS,
    Copies,
    FusedRows,
    Selection,
)
from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.guards import Classes
from fastskip.ops.allocate import to_device
from fastskip.ops.contracts import ARRIVALS, Bounds, Reach, Targets
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.tokens import Rows

Recipe = Callable[[RowNumbers], Tensor]
"""Computes numbers of a forward. A recipe made for one forward is valid for every other that has as
many rows of each class: it says which numbers are meant, never what they are."""
RowsRecipe = Callable[[RowNumbers], Rows]
Send = Callable[[Recipe], Tensor]
"""Evaluates a recipe and returns its numbers on the device, int32."""


def sender(numbers: RowNumbers, device: torch.device) -> Send:
    """Evaluates recipes for one forward and sends each one's numbers immediately."""
    return lambda recipe: to_device(recipe(numbers).to(torch.int32), device)


class StaticRows:
    """Makes the ``FusedRows`` of layers whose rows are all known on the host; layers that do the
    same share them.

    Everything is computed on the host and sent to the device once.
    """

    def __init__(
        self, plan: SkipPlan, numbers: RowNumbers, send: Send, device: torch.device
    ) -> None:
        self._plan, self._numbers, self._send = plan, numbers, send
        self._layout = numbers.layout
        self._made: dict[tuple[object, ...], FusedRows] = {}
        self._targets: dict[tuple[Classes, Classes], Targets] = {}
        self._arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
        self._selections: dict[Classes, Selection] = {}
        self._narrow = None
        if numbers.narrow is not None:
            self._narrow = self._select_rows(RowNumbers.continuing_rows)

    def _is_narrow(self, is_last: bool) -> bool:
        """Whether only the rows that continue leave the layer."""
        return is_last and self._narrow is not None

    def _static(self, layer: LayerPlan, is_narrow: bool) -> FusedRows:
        key = (layer.row_sets, is_narrow)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(layer, is_narrow)
        return found

    def _make(self, layer: LayerPlan, is_narrow: bool) -> FusedRows:
        joint = frozenset() if is_narrow else layer.attending
        stored = layer.projecting - joint
        attending = self._select(layer.attending, is_narrow)
        asking = RowNumbers.asking if is_narrow else RowNumbers.of
        queries: RowsRecipe = partial(asking, classes=layer.attending)
        reach = None
        if attending.count:
            reach = self._reach(layer.holding, layer.attending, queries)
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
            narrow=self._narrow if is_narrow else None,
            attending=attending,
            query_targets=self._query_targets(queries) if is_narrow else NO_TARGETS,
            feeding=self._select(layer.feeding, is_narrow),
            reach=reach,
            arrivals=self._arrivals,
        )

    def _select(self, classes: Classes, is_narrow: bool = False) -> Selection:
        """The rows of some classes; ``is_narrow``: among those that continue, indexing these."""
        if is_narrow:
            return self._select_rows(partial(RowNumbers.narrowed, classes=classes))
        found = self._selections.get(classes)
        if found is None:
            found = self._select_rows(partial(RowNumbers.of, classes=classes))
            self._selections[classes] = found
        return found

    def _select_rows(self, recipe: RowsRecipe) -> Selection:
        rows = recipe(self._numbers)
        if isinstance(rows.index, slice):
            return Selection(rows.index, rows.count)
        return Selection(slice(0, 0), rows.count, self._send(lambda n: _index_of(recipe(n))))

    def _targets_of(self, holding: Classes, classes: Classes) -> Targets:
        if not self._layout.rows(classes).count:
            return NO_TARGETS
        found = self._targets.get((holding, classes))
        if found is None:
            found = self._targets[holding, classes] = Targets(
                self._send(lambda n: n.positions(n.of(classes))),
                self._send(lambda n: n.sequences(n.of(classes))),
                self._send(lambda n: n.slots(holding, n.of(classes))),
            )
        return found

    def _query_targets(self, queries: RowsRecipe) -> Targets:
        """For queries that leave no entry: only their positions matter."""
        return Targets(
            self._send(lambda n: n.positions(queries(n))),
            self._send(lambda n: n.sequences(queries(n))),
            self._send(lambda n: torch.full_like(n.positions(queries(n)), -1)),
        )

    def _copies(self, source: int, classes: Classes, layer: LayerPlan) -> Copies:
        held, holding = self._plan.layers[source].holding, layer.holding
        return Copies(
            source,
            self._send(lambda n: n.sequences(n.of(classes))),
            self._send(lambda n: n.slots(held, n.of(classes))),
            self._send(lambda n: n.slots(holding, n.of(classes))),
        )

    def _reach(self, holding: Classes, attending: Classes, queries: RowsRecipe) -> Reach:
        """What those of ``queries`` see that are of classes ``attending``."""
        order, bounds = self._sort(attending, queries)
        limits = self._send(lambda n: n.limits(holding, queries(n)))
        is_whole = self._numbers.is_whole(holding, torch.tensor(bounds.host))
        return Reach(limits, order, bounds, is_whole)

    def _sort(self, classes: Classes, rows: RowsRecipe) -> tuple[Tensor, Bounds]:
        """The order of those of ``rows`` that are of ``classes``, and where sequences begin."""

        def bounds(numbers: RowNumbers) -> Tensor:
            return numbers.bounds(rows(numbers), classes)

        order = self._send(lambda n: n.order(rows(n), classes))
        return order, Bounds(tuple(bounds(self._numbers).tolist()), self._send(bounds))


def _index_of(rows: Rows) -> Tensor:
    assert isinstance(rows.index, Tensor)
    return rows.index
