"""One decoder layer on the fused operations: in place, a few launches a layer, none for a skip.

The same cells as ``layer.Block``; the same code runs a prompt and a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastskip.decoder.fused_parts import Copies, FusedRows, Selection, Store, Stream
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


class Readers(NamedTuple):
    """The norms that read all rows next, after a layer's attention and after its FFN: where there
    is one, updates leave half of it."""

    between: Norm | None
    behind: Norm | None


NOBODY = Readers(None, None)


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """A decoder layer as the device executor sees it; ``flash``: flash-attn's function, if used."""

    weights: LayerWeights
    plan: LayerPlan
    ops: FusedOperations
    scale: float
    head_dim: int
    flash: Callable[..., Any] | None = None

    def run(
        self, stream: Stream, rows: FusedRows, store: Store, readers: Readers = NOBODY
    ) -> Stream:
        """The layer's cell of the semantics table, in place on ``h [N, D]`` (or narrowed)."""
        if rows.before is not None:
            self.ops.route(stream.h, rows.before)
        if self.plan.arrangement is Arrangement.PARALLEL:
            return Stream(self.run_parallel(stream.h, rows, store))
        with span("attention"):
            stream = self.run_attention(stream, rows, store, readers.between)
        with span("ffn"):
            return self.run_ffn(stream, rows, readers.behind)

    def readers(self, rows: FusedRows, behind: Norm | None) -> tuple[Norm | None, Readers]:
        """The norm that reads all rows first, from the layer's beginning on, and the others;
        ``behind``: from its end on."""
        is_decided = rows.attention is not None or rows.ffn is not None
        if is_decided or self.plan.arrangement is Arrangement.PARALLEL:
            return None, Readers(None, behind)
        between = self.weights.ffn_norm if rows.feeding.count else behind
        attends = rows.joint.count or rows.stored.count
        return self.weights.attention_norm if attends else between, Readers(between, behind)

    def run_attention(
        self, stream: Stream, rows: FusedRows, store: Store, reader: Norm | None
    ) -> Stream:
        """Entries, narrowing, and the attention's update of the rows that go on."""
        queries = self._project(stream, rows, store)
        if rows.narrow is not None:
            stream = Stream(narrowed(stream.h, rows))
        if rows.reach is None:
            return stream
        mixed = self.attend(stream.h, queries, rows, store)
        terms = [Term(mixed, self.weights.output)]
        return self._update(stream, rows, rows.attending, terms, rows.then_attention, reader)

    def run_ffn(self, stream: Stream, rows: FusedRows, reader: Norm | None) -> Stream:
        """The FFN's update."""
        if not rows.feeding.count:
            return stream
        terms = [Term(self._feed(stream, rows), self.weights.down)]
        return self._update(stream, rows, rows.feeding, terms, rows.then_ffn, reader)

    def run_parallel(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
        """Both sublayers read ``h``; where they have the same rows, each half is one launch."""
        is_shared = rows.joint.count > 0 and rows.joint.is_same(rows.feeding)
        if is_shared:
            projection = self.projection(rows.joint_targets, store)
            queries, fed = self.ops.project_append_feed(
                rows.joint.view(h), projection, self.part(), index=rows.joint.index
            )
            self.leave_entries(Stream(h), rows, store)
            mixed = self.attend(h, queries, rows, store)
            terms = [Term(mixed, self.weights.output), Term(fed, self.weights.down)]
            self._add(h, rows, rows.joint, terms, rows.then_ffn)
            return h
        queries_alone = self._project(Stream(h), rows, store)
        h = narrowed(h, rows)
        terms = []
        if rows.feeding.count:
            terms = [Term(self._feed(Stream(h), rows), self.weights.down)]
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

    def _project(self, stream: Stream, rows: FusedRows, store: Store) -> Tensor | None:
        """Stores the layer's new entries; the queries of rows that were projected jointly."""
        queries, own = None, rows.joint
        if own.count:
            projection = self.projection(rows.joint_targets, store)
            queries = self.ops.project_append(
                own.view(stream.h),
                [projection],
                index=own.index,
                half=stream.half_of(projection.norm, own),
                arrivals=rows.arrivals,
            )[0]
        self.leave_entries(stream, rows, store)
        return queries

    def leave_entries(self, stream: Stream, rows: FusedRows, store: Store) -> None:
        """Stores entries of rows that skip attention: projected, or copied from a lower layer."""
        own = rows.stored
        if own.count:
            keys_values = self.weights.keys_values
            projection = self.projection(rows.stored_targets, store, linear=keys_values)
            self.ops.project_append(
                own.view(stream.h),
                [projection],
                index=own.index,
                half=stream.half_of(projection.norm, own),
                arrivals=rows.arrivals,
            )
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

    def _feed(self, stream: Stream, rows: FusedRows) -> Tensor:
        own, part = rows.feeding, self.part()
        return self.ops.feed(
            own.view(stream.h),
            [part],
            index=own.index,
            arrivals=rows.arrivals,
            half=stream.half_of(part.norm, own),
        )[0]

    def _update(
        self,
        stream: Stream,
        rows: FusedRows,
        own: Selection,
        terms: list[Term],
        then: Route | None,
        reader: Norm | None,
    ) -> Stream:
        """``_add``, and the half of the norm that reads all of it next, if that is wanted."""
        h = stream.h
        if reader is None or then is not None or not own.is_all_of(h):
            self._add(h, rows, own, terms, then)
            return Stream(h)
        return Stream(h, self.ops.add_terms_and_halve_(h, terms, reader, arrivals=rows.arrivals))

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
            block.leave_entries(Stream(h), own, store)
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
    reader: Norm | None = None,
) -> Stream:
    """Every step of the plan, or those of ``steps``, on ``h [N, D]``, which is written.

    ``reader``: the norm that reads all rows after them; given, updates leave the half of the norm
    behind them wherever that reads all rows too.
    """
    steps = plan.steps if steps is None else steps
    readers = _readers(plan, blocks, rows_of, steps, reader)
    stream = Stream(h)
    for step, own_readers in zip(steps, readers, strict=True):
        is_last = step is plan.steps[-1]
        own = [blocks[index] for index in step]
        rows = [rows_of(block.plan, is_last) for block in own]
        if watch is not None:
            for index in step:
                watch(index, stream.h)
        with span(f"layer {'+'.join(map(str, step))}"):
            if len(step) == 1:
                stream = own[0].run(stream, rows[0], store, own_readers)
            else:
                pair = own[0], own[1]
                stream = Stream(run_pair(pair, stream.h, (rows[0], rows[1]), store))
    return stream


def _readers(
    plan: SkipPlan,
    blocks: Sequence[FusedBlock],
    rows_of: RowsOf,
    steps: Sequence[tuple[int, ...]],
    reader: Norm | None,
) -> list[Readers]:
    """Of each step; nobody where no half is wanted."""
    found = [NOBODY] * len(steps)
    if reader is None:
        return found
    for number, step in reversed(list(enumerate(steps))):
        block = blocks[step[0]]
        if len(step) > 1:
            reader = None
        else:
            rows = rows_of(block.plan, step is plan.steps[-1])
            reader, found[number] = block.readers(rows, reader)
    return found
