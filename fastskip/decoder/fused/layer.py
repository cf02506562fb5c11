"""One decoder layer on the fused operations: in place, in few launches, none for what is skipped.

It implements the cells of ``decoder.layer.Block``; the same code runs prompts and decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastskip.decoder.fused.parts import Copies, FusedRows, Selection, Store, Stream
from fastskip.decoder.weights import LayerWeights
from fastskip.ops.contracts import Feed, Linear, Norm, Projection, StepReach, Targets, Term
from fastskip.ops.flash import attend_packed
from fastskip.ops.operations import FusedOperations
from fastskip.ops.ranges import span
from fastskip.ops.routes import Chosen, Route
from fastskip.plan import LayerPlan
from fastskip.policy import Arrangement
from fastskip.policy import Norm as NormKind


class Readers(NamedTuple):
    """The norms that read all rows next, after a layer's attention and after its FFN: where there
    is one, the update before it also computes half of it."""

    between: Norm | None
    behind: Norm | None


NO_READERS = Readers(None, None)


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
        self, stream: Stream, rows: FusedRows, store: Store, readers: Readers = NO_READERS
    ) -> Stream:
        """The layer's cell of the semantics table, in place on ``h [N, D]`` (or narrowed)."""
        self.decide(stream.h, rows.before)
        if self.plan.arrangement is Arrangement.PARALLEL:
            return Stream(self.run_parallel(stream.h, rows, store))
        with span("attention"):
            stream = self.run_attention(stream, rows, store, readers.between)
        with span("ffn"):
            return self.run_ffn(stream, rows, readers.behind)

    def readers(self, rows: FusedRows, behind: Norm | None) -> tuple[Norm | None, Readers]:
        """The norm that reads all rows next from the layer's start on, and the layer's readers;
        ``behind``: the one from its end on."""
        is_decided = rows.attention is not None or rows.ffn is not None
        if is_decided or self.plan.arrangement is Arrangement.PARALLEL:
            return None, Readers(None, behind)
        between = self.weights.ffn_norm if rows.feeding.count else behind
        attends = rows.joint.count or rows.stored.count
        return self.weights.attention_norm if attends else between, Readers(between, behind)

    def run_attention(
        self, stream: Stream, rows: FusedRows, store: Store, reader: Norm | None
    ) -> Stream:
        """Stores entries, narrows, and applies the attention's update to the rows that continue."""
        queries = self._project(stream, rows, store)
        if rows.narrow is not None:
            stream = Stream(rows.narrow.take(stream.h))
        if rows.reach is None:
            return stream
        mixed = self.attend(stream.h, queries, rows, store)
        terms = [Term(mixed, self.weights.output)]
        return self._update(stream, rows, rows.attending, terms, rows.then_attention, reader)

    def run_ffn(self, stream: Stream, rows: FusedRows, reader: Norm | None) -> Stream:
        """Applies the FFN's update."""
        if not rows.feeding.count:
            return stream
        terms = [Term(self._feed(stream, rows), self.weights.down)]
        return self._update(stream, rows, rows.feeding, terms, rows.then_ffn, reader)

    def run_parallel(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
        """Both sublayers read ``h``; where they run the same rows, each half is one launch."""
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

    def decide(self, h: Tensor, due: Route | None) -> None:
        """Makes the decisions on ``h [N, D]`` that are due, if any."""
        if due is not None:
            self.ops.route(h, due)

    def _project(self, stream: Stream, rows: FusedRows, store: Store) -> Tensor | None:
        """Stores the layer's new entries; returns the queries of jointly projected rows."""
        queries = None
        if rows.joint.count:
            projection = self.projection(rows.joint_targets, store)
            queries = self._append(stream, rows, rows.joint, projection)
        self.leave_entries(stream, rows, store)
        return queries

    def leave_entries(self, stream: Stream, rows: FusedRows, store: Store) -> None:
        """Stores entries of rows that skip attention: projected, or copied from a lower layer."""
        if rows.stored.count:
            keys_values = self.weights.keys_values
            projection = self.projection(rows.stored_targets, store, linear=keys_values)
            self._append(stream, rows, rows.stored, projection)
        for copies in rows.copies:
            self.copy(copies, store)

    def _append(
        self, stream: Stream, rows: FusedRows, own: Selection, projection: Projection
    ) -> Tensor:
        """Projects the rows ``own`` and stores their entries; returns their queries
        ``[n, H, K]``."""
        return self.ops.project_append(
            own.view(stream.h),
            [projection],
            index=own.index,
            half=stream.half_of(projection.norm, own),
            arrivals=rows.arrivals,
        )[0]

    def copy(self, copies: Copies, store: Store) -> None:
        """Copies entries from a lower layer."""
        self.ops.copy_entries(
            store.pages(copies.source),
            store.pages(self.plan.index),
            copies.sequences,
            copies.from_slots,
            copies.to_slots,
            copies.runs,
        )

    def attend(self, h: Tensor, queries: Tensor | None, rows: FusedRows, store: Store) -> Tensor:
        """``[n, H * K]`` of the attending rows of ``h``, which is already narrowed."""
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
        """``_add``, and half of the norm that reads all of it next, if there is a ``reader``."""
        h = stream.h
        if reader is None or then is not None or not own.is_all_of(h):
            self._add(h, rows, own, terms, then)
            return Stream(h)
        half = self.ops.add_terms_and_halve_(
            h, terms, reader, factor=self.weights.multiplier, arrivals=rows.arrivals
        )
        return Stream(h, half)

    def _add(
        self, h: Tensor, rows: FusedRows, own: Selection, terms: list[Term], then: Route | None
    ) -> None:
        """``own``: the rows that the terms belong to."""
        self.ops.add_terms_(
            own.view(h),
            terms,
            index=own.index,
            factor=self.weights.multiplier,
            then=then,
            arrivals=rows.arrivals,
        )

    def add_chosen(
        self, h: Tensor, terms: list[Term], chosen: list[Chosen], then: Route | None = None
    ) -> Tensor:
        """Adds terms to the rows that each is for."""
        factor = self.weights.multiplier
        return self.ops.add_terms_(h, terms, factor=factor, chosen=chosen, then=then)

    def part(self) -> Feed:
        """The first half of the FFN."""
        is_shared = (
            self.plan.arrangement is Arrangement.PARALLEL and self.plan.norm is NormKind.SHARED
        )
        norm: Norm = self.weights.attention_norm if is_shared else self.weights.ffn_norm
        assert self.weights.activation is not None
        return Feed(norm, self.weights.feed, self.weights.activation)

    def projection(
        self, targets: Targets, store: Store, *, linear: Linear | None = None, leaves: bool = True
    ) -> Projection:
        """From rows to queries and entries; ``linear``: only that part of the projection."""
        return Projection(
            self.weights.attention_norm,
            self.weights.qkv if linear is None else linear,
            store.rotation,
            targets,
            store.pages(self.plan.index) if leaves else None,
            self.head_dim,
            head_norms=self.weights.head_norms,
        )


def narrowed(h: Tensor, rows: FusedRows) -> Tensor:
    """The rows that continue once entries are stored."""
    return h if rows.narrow is None else rows.narrow.take(h)
