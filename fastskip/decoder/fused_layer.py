"""One decoder layer on the fused operations: in place, a few launches a layer, none for a skip.

The same cells as ``layer.Block``; the same code runs a prompt and a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastskip.decoder.fused_parts import Copies, FusedRows, Selection, Store
from fastskip.decoder.stack import Watch
from fastskip.decoder.weights import LayerWeights
from fastskip.ops.contracts import Feed, Linear, Norm, Projection, StepReach, Targets, Term
from fastskip.ops.flash import attend_packed
from fastskip.ops.operations import FusedOperations
from fastskip.ops.ranges import span
from fastskip.ops.routes import Route
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import Arrangement, Combine
from fastskip.policy import Norm as NormKind

# From a layer's plan, and whether it is in the last step, to what enters its parts.
RowsOf = Callable[[LayerPlan, bool], FusedRows]


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """A decoder layer as the device executor sees it; ``flash``: flash-attn's function, if used."""

    weights: LayerWeights
    plan: LayerPlan
    ops: FusedOperations
    scale: float
    head_dim: int
    flash: Callable[..., Any] | None = None

    def run(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
        """The layer's cell of the semantics table, in place on ``h [N, D]`` (or narrowed)."""
        if rows.before is not None:
            self.ops.route(h, rows.before)
        if self.plan.arrangement is Arrangement.PARALLEL:
            return self.run_parallel(h, rows, store)
        with span("attention"):
            h = self.run_attention(h, rows, store)
        with span("ffn"):
            self.run_ffn(h, rows)
        return h

    def run_attention(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
        """Entries, narrowing, and the attention's update of the rows that go on."""
        queries = self._project(h, rows, store)
        h = narrowed(h, rows)
        if rows.reach is not None:
            mixed = self.attend(h, queries, rows, store)
            terms = [Term(mixed, self.weights.output)]
            self._add(h, rows, rows.attending, terms, rows.then_attention)
        return h

    def run_ffn(self, h: Tensor, rows: FusedRows) -> None:
        """The FFN's update."""
        if rows.feeding.count:
            terms = [Term(self._feed(h, rows), self.weights.down)]
            self._add(h, rows, rows.feeding, terms, rows.then_ffn)

    def run_parallel(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
        """Both sublayers read ``h``; where they have the same rows, each half is one launch."""
        is_shared = rows.joint.count > 0 and rows.joint.is_same(rows.feeding)
        if is_shared:
            projection = self.projection(rows.joint_targets, store)
            queries, fed = self.ops.project_append_feed(
                rows.joint.view(h), projection, self.part(), index=rows.joint.index
            )
            self.leave_entries(h, rows, store)
            mixed = self.attend(h, queries, rows, store)
            terms = [Term(mixed, self.weights.output), Term(fed, self.weights.down)]
            self._add(h, rows, rows.joint, terms, rows.then_ffn)
            return h
        queries_alone = self._project(h, rows, store)
        h = narrowed(h, rows)
        terms = []
        if rows.feeding.count:
            terms = [Term(self._feed(h, rows), self.weights.down)]
        if rows.reach is not None:
            mixed = self.attend(h, queries_alone, rows, store)
            own = Term(mixed, self.weights.output)
            if terms and rows.attending.is_same(rows.feeding):
                terms.insert(0, own)
            else:
                self._add(h, rows, rows.attending, [own], None if terms else rows.then_ffn)
        if terms:
            self._add(h, rows, rows.feeding, terms, rows.then_ffn)
        return h

    def _project(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor | None:
        """Stores the layer's new entries; the queries of rows that were projected jointly."""
        queries = None
        if rows.joint.count:
            projection = self.projection(rows.joint_targets, store)
            queries = self.ops.project_append(
                rows.joint.view(h), [projection], index=rows.joint.index
            )[0]
        self.leave_entries(h, rows, store)
        return queries

    def leave_entries(self, h: Tensor, rows: FusedRows, store: Store) -> None:
        """Stores entries of rows that skip attention: projected, or copied from a lower layer."""
        if rows.stored.count:
            keys_values = self.weights.keys_values
            projection = self.projection(rows.stored_targets, store, linear=keys_values)
            self.ops.project_append(rows.stored.view(h), [projection], index=rows.stored.index)
        for copies in rows.copies:
            self.copy(copies, store)

    def copy(self, copies: Copies, store: Store) -> None:
        """Takes entries over from a lower layer."""
        self.ops.copy_entries(
            store.pages(copies.source),
            store.pages(self.plan.index),
            copies.sequences,
            copies.from_slots,
            copies.to_slots,
            copies.runs,
        )

    def attend(self, h: Tensor, queries: Tensor | None, rows: FusedRows, store: Store) -> Tensor:
        """``[n, H * K]`` of the attending rows of ``h``, which is what goes on."""
        if queries is None:
            alone = self.projection(
                rows.query_targets, store, linear=self.weights.queries, leaves=False
            )
            queries = self.ops.project_append(
                rows.attending.view(h), [alone], index=rows.attending.index
            )[0]
        own = store.pages(self.plan.index)
        if isinstance(rows.reach, StepReach):
            return self.ops.attend_step([queries], [rows.reach], [own], self.scale)[0]
        assert rows.reach is not None
        if self.flash is not None and rows.reach.is_whole:
            return attend_packed(self.flash, self.ops, queries, rows.reach, own, self.scale)
        return self.ops.attend_rows(queries, rows.reach, own, self.scale)

    def _feed(self, h: Tensor, rows: FusedRows) -> Tensor:
        own = rows.feeding
        return self.ops.feed(own.view(h), [self.part()], index=own.index, arrivals=rows.arrivals)[0]

    def _add(
        self, h: Tensor, rows: FusedRows, own: Selection, terms: list[Term], then: Route | None
    ) -> None:
        """``own``: which of the rows the terms are of."""
        self.ops.add_terms_(own.view(h), terms, index=own.index, then=then, arrivals=rows.arrivals)

    def part(self) -> Feed:
        """The first half of the FFN."""
        is_shared = (
            self.plan.arrangement is Arrangement.PARALLEL and self.plan.norm is NormKind.SHARED
        )
        norm: Norm = self.weights.attention_norm if is_shared else self.weights.ffn_norm
        return Feed(norm, self.weights.feed, self.weights.activation)

    def projection(
        self, targets: Targets, store: Store, *, linear: Linear | None = None, leaves: bool = True
    ) -> Projection:
        """From rows to queries and entries; ``linear``: only that part of the product."""
        return Projection(
            self.weights.attention_norm,
            self.weights.qkv if linear is None else linear,
            store.rotation,
            targets,
            store.pages(self.plan.index) if leaves else None,
            self.head_dim,
            head_norms=self.weights.head_norms,
        )


def run_pair(
    blocks: tuple[FusedBlock, FusedBlock],
    h: Tensor,
    rows: tuple[FusedRows, FusedRows],
    store: Store,
) -> Tensor:
    """Two blocks from the same input, each half of both in one launch.

    ``out = h + d_l + d_{l+1}``, or their mean, where ``d`` is all that a dense block adds.
    """
    ops, (first, second) = blocks[0].ops, rows
    if first.before is not None:
        ops.route(h, first.before)
    entries = [store.pages(block.plan.index) for block in blocks]
    queries: list[Tensor] | None = None
    if first.joint.count:
        both = [
            block.projection(own.joint_targets, store)
            for block, own in zip(blocks, rows, strict=True)
        ]
        queries = ops.project_append(first.joint.view(h), both, index=first.joint.index)
    if first.stored.count:
        for block, own in zip(blocks, rows, strict=True):
            block.leave_entries(h, own, store)
    h = narrowed(h, first)
    if first.reach is None:  # every row that goes on is a pad
        return h
    if isinstance(first.reach, StepReach) and isinstance(second.reach, StepReach):
        assert queries is not None
        mixed = ops.attend_step(queries, [first.reach, second.reach], entries, blocks[0].scale)
    else:
        mixed = [
            block.attend(h, None if queries is None else queries[number], own, store)
            for number, (block, own) in enumerate(zip(blocks, rows, strict=True))
        ]
    changes = ops.apply_terms(
        [Term(own, block.weights.output) for own, block in zip(mixed, blocks, strict=True)]
    )
    fed = ops.feed(h, [block.part() for block in blocks], changes=changes)
    downs = [Term(own, block.weights.down) for own, block in zip(fed, blocks, strict=True)]
    factor = 0.5 if blocks[0].plan.combine is Combine.MEAN else 1.0
    return ops.add_terms_(h, downs, changes=changes, factor=factor, then=first.then_ffn)


def narrowed(h: Tensor, rows: FusedRows) -> Tensor:
    """The rows that go on after the entries."""
    return h if rows.narrow is None else rows.narrow.take(h)


def run_steps(
    plan: SkipPlan,
    blocks: Sequence[FusedBlock],
    h: Tensor,
    rows_of: RowsOf,
    store: Store,
    watch: Watch | None = None,
    steps: Sequence[tuple[int, ...]] | None = None,
) -> Tensor:
    """Every step of the plan, or those of ``steps``, on ``h [N, D]``, which is written."""
    for step in plan.steps if steps is None else steps:
        is_last = step is plan.steps[-1]
        own = [blocks[index] for index in step]
        rows = [rows_of(block.plan, is_last) for block in own]
        if watch is not None:
            for index in step:
                watch(index, h)
        with span(f"layer {'+'.join(map(str, step))}"):
            if len(step) == 1:
                h = own[0].run(h, rows[0], store)
            else:
                h = run_pair((own[0], own[1]), h, (rows[0], rows[1]), store)
    return h
