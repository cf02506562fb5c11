"""One decoder layer on the fused operations: in place, a few launches a layer, none for a skip.

The same cells as ``layer.Block``; the same code runs a prompt and a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastskip.decoder.weights import LayerWeights
from fastskip.ops.contracts import (
    Feed,
    Linear,
    Norm,
    Pages,
    Projection,
    Reach,
    Rotation,
    StepReach,
    Targets,
    Term,
)
from fastskip.ops.flash import attend_packed
from fastskip.ops.operations import FusedOperations
from fastskip.ops.ranges import span
from fastskip.plan import LayerPlan
from fastskip.policy import Arrangement, Combine
from fastskip.policy import Norm as NormKind


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of ``[N, D]``: a span, or, where ``index`` is given, any rows of the whole."""

    span: slice
    count: int
    index: Tensor | None = None

    def view(self, h: Tensor) -> Tensor:
        return h if self.index is not None or self.count == len(h) else h[self.span]

    def take(self, h: Tensor) -> Tensor:
        """The rows, in memory of their own."""
        return h[self.span].clone() if self.index is None else h[self.index.long()]

    def is_same(self, other: Selection) -> bool:
        return self is other or (
            self.index is None and other.index is None and self.span == other.span
        )


@dataclass(frozen=True, slots=True)
class Copies:
    """Entries that a layer takes over from a lower one: ``[n]`` sequences and slots."""

    source: int
    sequences: Tensor
    from_slots: Tensor
    to_slots: Tensor


@dataclass(frozen=True, slots=True)
class FusedRows:
    """What enters each part of one layer; see ``layer.BlockRows``.

    ``joint_targets``, ``stored_targets``: where entries go; ``query_targets``: positions of queries
    that are projected alone (the last layer's). ``reach``: what the attending rows see; ``None``
    without any.
    """

    joint: Selection
    joint_targets: Targets
    stored: Selection
    stored_targets: Targets
    copies: tuple[Copies, ...]
    narrow: Selection | None
    attending: Selection
    query_targets: Targets
    feeding: Selection
    reach: Reach | StepReach | None


@dataclass(frozen=True, slots=True)
class Store:
    """What all layers of a forward share: RoPE tables, and where each layer's entries lie."""

    rotation: Rotation | None
    pages: Callable[[int], Pages]


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
        if self.plan.arrangement is Arrangement.PARALLEL:
            return self._run_parallel(h, rows, store)
        with span("attention"):
            queries = self._project(h, rows, store)
            h = _narrowed(h, rows)
            if rows.reach is not None:
                mixed = self.attend(h, queries, rows, store)
                self._add(h, rows.attending, [Term(mixed, self.weights.output)])
        with span("ffn"):
            if rows.feeding.count:
                fed = self._feed(h, rows.feeding)
                self._add(h, rows.feeding, [Term(fed, self.weights.down)])
        return h

    def _run_parallel(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
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
            self._add(h, rows.joint, terms)
            return h
        queries_alone = self._project(h, rows, store)
        h = _narrowed(h, rows)
        terms = []
        if rows.feeding.count:
            terms = [Term(self._feed(h, rows.feeding), self.weights.down)]
        if rows.reach is not None:
            mixed = self.attend(h, queries_alone, rows, store)
            own = Term(mixed, self.weights.output)
            if terms and rows.attending.is_same(rows.feeding):
                terms.insert(0, own)
            else:
                self._add(h, rows.attending, [own])
        if terms:
            self._add(h, rows.feeding, terms)
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
            self.ops.copy_entries(
                store.pages(copies.source),
                store.pages(self.plan.index),
                copies.sequences,
                copies.from_slots,
                copies.to_slots,
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

    def _feed(self, h: Tensor, rows: Selection) -> Tensor:
        return self.ops.feed(rows.view(h), [self.part()], index=rows.index)[0]

    def _add(self, h: Tensor, rows: Selection, terms: list[Term]) -> None:
        self.ops.add_terms_(rows.view(h), terms, index=rows.index)

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
    h = _narrowed(h, first)
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
    return ops.add_terms_(h, downs, changes=changes, factor=factor)


def _narrowed(h: Tensor, rows: FusedRows) -> Tensor:
    return h if rows.narrow is None else rows.narrow.take(h)
