"""One forward of the plain runtime: rows pass through the plan's steps, fewer after removals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastskip.decoder.attention_maps import AttentionMaps
from fastskip.decoder.deep_features import DeepFeatures, PlacedFeatures
from fastskip.decoder.entries import Entries
from fastskip.decoder.guards import narrows_after
from fastskip.decoder.layer import Add, Block, BlockRows
from fastskip.decoder.planned_rows import PlannedRows
from fastskip.decoder.positions import HeadRotation
from fastskip.decoder.recomputing import maybe_recomputed
from fastskip.decoder.removing import RemainingRows, may_leave
from fastskip.decoder.routed_rows import RoutedRows
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import Combine
from fastskip.routing import Decisions
from fastskip.tokens import Rows, TokenLayout

Watch = Callable[[int, Tensor], None]


@dataclass(frozen=True, slots=True, eq=False)
class ForwardOptions:
    """What is wanted of a forward, and what else enters it.

    Attributes:
        wanted: ``[n]`` flat indices into ``B * T`` of the only rows whose output is read (the
            last-layer rule), in output order; ``None``: all rows.
        wants_gradient: run out of place, so that autograd can follow.
        keeps_cache: whether anyone reads the cache after this forward.
        watch: called with (layer, ``[N, D]``) for the input of every layer, before features are
            added, as Hugging Face reports hidden states.
        maps: records how rows attend in every layer.
        features: what is added to image rows after the first layers.
    """

    wanted: Tensor | None = None
    wants_gradient: bool = False
    keeps_cache: bool = True
    watch: Watch | None = None
    maps: AttentionMaps | None = None
    features: DeepFeatures | None = None


DEFAULTS = ForwardOptions()


class PlainForward:
    """One forward: its rows, what they compute, and what is added and removed on the way.

    Attributes:
        layout, rotation: of the rows that it begins with.
        narrow: the only rows that the last step has to return; ``None``: all of them. Where
            routers or removals still need the others there, they are selected after it.
        static: the rows as the plan determines them, among those that are left.
        routed: the rows as routers determine them; set by the caller if the plan has routers.
    """

    def __init__(
        self,
        plan: SkipPlan,
        blocks: Sequence[Block],
        layers: Sequence[Any],
        layout: TokenLayout,
        rotation: HeadRotation,
        entries: Entries,
        combine: Add,
        options: ForwardOptions,
    ) -> None:
        """``layers``: Hugging Face's own; the rest as for ``Decoder.run``."""
        self._plan, self._blocks, self._layers = plan, blocks, layers
        self._entries, self._combine = entries, combine
        wanted, watch = options.wanted, options.watch
        self._wanted, self._watch, self._features = wanted, watch, options.features
        self.layout, self.rotation = layout, rotation
        few = None if wanted is None else layout.locate(wanted)
        is_late = few is not None and (narrows_after(plan) or may_leave(plan, layout, few))
        self.narrow: Rows | None = None if is_late else few
        self._late: Rows | None = few if is_late else None
        keeps_gone = watch is not None or self.narrow is None
        self._rest = RemainingRows(plan, blocks, layout, rotation, entries, keeps_gone=keeps_gone)
        self._removing = {rule.after_layer for rule in plan.removals}
        self.static = PlannedRows(plan, layout, entries, self.narrow)
        self.routed: RoutedRows | None = None
        self._placed = self._place()
        # The layers whose features have not been added yet.
        self._behind: tuple[int, ...] = ()

    def run(self, h: Tensor) -> Tensor:
        """Runs packed rows ``[N, D]`` through all steps: ``[N, D]``, or ``[n, D]`` as wanted."""
        for step in self._plan.steps:
            h = self._enter(step, h)
            h = self._compute(step, h)
            if step[-1] in self._removing:
                h = self._remove(step[-1], h)
        h = self._add_features(h)
        if self.narrow is not None:
            return h
        whole = self._rest.whole(h)
        return whole if self._late is None else self._late.take(whole)

    def decisions(self) -> Decisions:
        """Which rows skipped, or were removed."""
        return self._rest.decisions(self._plan) if self.routed is None else self.routed.decisions()

    def _enter(self, step: tuple[int, ...], h: Tensor) -> Tensor:
        """Before a step: adds the previous step's features; then routers and removals look."""
        if self._watch is not None:
            for index in step:
                self._watch(index, self._rest.whole(h))
        h = self._add_features(h)
        self._behind = step
        if self.routed is not None:
            self.routed.enter(step, h)
        self._rest.look(step[-1], h)
        return h

    def _compute(self, step: tuple[int, ...], h: Tensor) -> Tensor:
        blocks = [self._blocks[index] for index in step]
        rows_of = self.static.of if self.routed is None else self.routed.of
        is_last = step is self._plan.steps[-1]
        inputs = [rows_of(block.plan, is_last) for block in blocks]
        runs = [
            maybe_recomputed(
                block.run if len(step) == 1 else block.change,
                self._layers[index],
                index,
                self._entries,
            )
            for index, block in zip(step, blocks, strict=True)
        ]
        rotation, entries, combine = self._rest.rotation, self._entries, self._combine
        if len(step) == 1:
            return runs[0](h, inputs[0], rotation, entries, combine)
        plans = [block.plan for block in blocks]
        return _run_pair(h, plans, runs, inputs, rotation, entries, combine)

    def _remove(self, layer: int, h: Tensor) -> Tensor:
        """After a layer: removes rows, once features are added."""
        h = self._add_features(h)
        before = self._rest.layout
        h = self._rest.remove(layer, h)
        layout = self._rest.layout
        if layout is not before:
            if self.narrow is not None and self._wanted is not None:
                self.narrow = layout.locate(self._wanted)
            self.static = PlannedRows(self._plan, layout, self._entries, self.narrow)
            self._placed = self._place()
        return h

    def _add_features(self, h: Tensor) -> Tensor:
        if self._placed is not None:
            h = self._placed.enter(self._behind, h, self._combine)
        self._behind = ()
        return h

    def _place(self) -> PlacedFeatures | None:
        return None if self._features is None else self._features.among(self._rest.layout)


def _run_pair(
    h: Tensor,
    plans: Sequence[LayerPlan],
    changes: Sequence[Callable[..., Tensor]],
    inputs: Sequence[BlockRows],
    rotation: HeadRotation,
    entries: Entries,
    combine: Add,
) -> Tensor:
    """Runs two layers: paired rows read the same ``h`` in both, others run them one by one.

    Paired: ``out = h + d1 + d2``, or with the mean of the two changes. Where the pair stores the
    mean of its K and V, paired rows read the first layer's cache in both.
    """
    paired, alone = inputs[0].paired, inputs[0].alone
    plan, other = plans
    if plan.merges_kv and paired.count and not plan.is_arranged_whole:
        entries.adopt(other.index, plan.index)
    first = changes[0](h, inputs[0], rotation, entries)
    if alone.count:
        h = combine(h, alone, alone.take(first))
    second = changes[1](h, inputs[1], rotation, entries)
    if plan.merges_kv:
        entries.average(plan.index, other.index, inputs[0].merged)
    h = h if inputs[0].narrow is None else inputs[0].narrow.take(h)
    if alone.count:
        h = combine(h, alone, alone.take(second))
    change = paired.take(first) + paired.take(second)
    change = change / 2 if plan.combine is Combine.MEAN else change
    return combine(h, paired, change)
