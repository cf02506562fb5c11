"""A decoder layer whose rows are chosen on the device: the fused operations, guarded by flags.

The host knows how many rows there may be and where each lies, but never how many run. Tensors of
rows are therefore in the order of ``h``; their values for rows that do not run are unspecified.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from fastskip.decoder.fused.layer import FusedBlock, narrowed
from fastskip.decoder.fused.parts import (
    FusedRows,
    GuardedAttention,
    GuardedFeed,
    Selection,
    Store,
    Stream,
)
from fastskip.ops.bodies import Bodies
from fastskip.ops.contracts import Norm, Reach, StepReach, Targets, Term
from fastskip.ops.routes import Chosen, Route


@dataclass(frozen=True, slots=True)
class Queries:
    """Rotated queries ``[N, H, K]``, the rows that have one, and what they see."""

    rows: Tensor
    chosen: Chosen
    reach: Reach | StepReach


class GuardedBlock(FusedBlock):
    """A ``FusedBlock`` that uses the guarded parts of its rows where there are any."""

    def run_attention(
        self, stream: Stream, rows: FusedRows, store: Store, reader: Norm | None
    ) -> Stream:
        own = rows.attention
        if own is None:
            return super().run_attention(stream, rows, store, reader)
        queries = self._project_guarded(stream.h, rows, own, store)
        h = narrowed(stream.h, rows)
        terms = [Term(self._attend_guarded(queries, store), self.weights.output)]
        self.add_chosen(h, terms, [queries.chosen], rows.then_attention)
        return Stream(h)

    def run_ffn(self, stream: Stream, rows: FusedRows, reader: Norm | None) -> Stream:
        own = rows.ffn
        if own is None:
            return super().run_ffn(stream, rows, reader)
        fed, chosen = self._feed_guarded(stream.h, rows, own)
        terms = [Term(fed, self.weights.down)]
        self.add_chosen(stream.h, terms, [chosen], rows.then_ffn)
        return Stream(stream.h)

    def run_parallel(self, h: Tensor, rows: FusedRows, store: Store) -> Tensor:
        """Both sublayers read ``h``, so neither updates it before the other has read it."""
        attention, ffn = rows.attention, rows.ffn
        if attention is None and ffn is None:
            return super().run_parallel(h, rows, store)
        if attention is not None and ffn is not None and rows.narrow is None:
            return self._run_merged(h, rows, attention, ffn, store)
        queries, static = None, None
        if attention is not None:
            queries = self._project_guarded(h, rows, attention, store)
        else:
            static = self._project(Stream(h), rows, store)
        h = narrowed(h, rows)
        fed, feeds = None, None
        if ffn is not None:
            fed, feeds = self._feed_guarded(h, rows, ffn)
        elif rows.feeding.count:
            fed = self._feed(Stream(h), rows)
        if queries is not None:
            own = Term(self._attend_guarded(queries, store), self.weights.output)
            self.add_chosen(h, [own], [queries.chosen])
        elif rows.reach is not None:
            own = Term(self.attend(h, static, rows, store), self.weights.output)
            self._add(h, rows, rows.attending, [own], None)
        if fed is not None and feeds is not None:
            self.add_chosen(h, [Term(fed, self.weights.down)], [feeds], rows.then_ffn)
        elif fed is not None:
            self._add(h, rows, rows.feeding, [Term(fed, self.weights.down)], rows.then_ffn)
        else:
            self.decide(h, rows.then_ffn)
        return h

    def _run_merged(
        self,
        h: Tensor,
        rows: FusedRows,
        attention: GuardedAttention,
        ffn: GuardedFeed,
        store: Store,
    ) -> Tensor:
        """Both sublayers guarded: each half takes one launch, as in a layer without guards."""
        targets, reach = self._placed(attention, rows)
        attends = self.ops.choose_rows(attention.runs)
        feeds = attends if ffn.runs is attention.runs else self.ops.choose_rows(ffn.runs)
        own = replace(self.projection(targets, store), leaves_all=attention.leaves_all)
        found, fed = self.ops.project_append_feed(h, own, self.part(), chosen=(attends, feeds))
        self._copy(attention, targets, store)
        mixed = self._attend_guarded(Queries(found, attends, reach), store)
        terms = [Term(mixed, self.weights.output), Term(fed, self.weights.down)]
        return self.add_chosen(h, terms, [attends, feeds], rows.then_ffn)

    def _project_guarded(
        self, h: Tensor, rows: FusedRows, own: GuardedAttention, store: Store
    ) -> Queries:
        """Stores the layer's entries; returns the queries of the rows that continue and attend."""
        targets, reach = self._placed(own, rows)
        narrow = rows.narrow
        if narrow is None:
            chosen = self.ops.choose_rows(own.runs)
            projection = replace(self.projection(targets, store), leaves_all=own.leaves_all)
            queries = self.ops.project_append(h, [projection], chosen=chosen)[0]
            self._copy(own, targets, store)
            return Queries(queries, chosen, reach)
        self._leave_all(h, targets, store)
        self._copy(own, targets, store)
        runs = narrow.take(own.runs)
        chosen = self.ops.choose_rows(runs)
        parts = (narrow.take(t) for t in (targets.positions, targets.sequences, targets.slots))
        alone = self.projection(Targets(*parts), store, linear=self.weights.queries, leaves=False)
        queries = self.ops.project_append(narrow.take(h), [alone], chosen=chosen)[0]
        return Queries(queries, chosen, replace(reach, runs=runs))

    def _leave_all(self, h: Tensor, targets: Targets, store: Store) -> None:
        """Projects and stores the entries of every row that has a slot."""
        keys_values = self.projection(targets, store, linear=self.weights.keys_values)
        self.ops.project_append(h, [keys_values])

    def _placed(self, own: GuardedAttention, rows: FusedRows) -> tuple[Targets, Reach | StepReach]:
        """Where entries go and what rows see; for a hollow layer's prompt, by the flags."""
        targets, reach, placing = own.targets, replace(own.reach, runs=own.runs), own.placing
        if placing is None:
            return targets, reach
        held = own.runs
        if placing.stored is not None:
            held = torch.maximum(held, placing.stored)
        placing.note(held)
        slots, limits = self.ops.place_entries(held, placing.order, placing.bounds, placing.counts)
        assert isinstance(reach, Reach)
        limits = limits if rows.narrow is None else rows.narrow.take(limits)
        return replace(targets, slots=slots), replace(reach, limits=limits)

    def _copy(self, own: GuardedAttention, targets: Targets, store: Store) -> None:
        for copies in own.copies:
            is_hollow = own.placing is not None
            self.copy(replace(copies, to_slots=targets.slots) if is_hollow else copies, store)

    def _attend_guarded(self, queries: Queries, store: Store) -> Tensor:
        """``[N, H * K]`` of the rows that attend."""
        pages = store.pages(self.plan.index)
        if isinstance(queries.reach, StepReach):
            return self.ops.attend_step([queries.rows], [queries.reach], [pages], self.scale)[0]
        return self.ops.attend_rows(queries.rows, queries.reach, pages, self.scale)

    def _feed_guarded(self, h: Tensor, rows: FusedRows, own: GuardedFeed) -> tuple[Tensor, Chosen]:
        """``[N, F]`` of the rows of ``h``, which is already narrowed, that run the FFN."""
        runs = own.runs if rows.narrow is None else rows.narrow.take(own.runs)
        if own.between is not None:
            between = own.between
            if rows.narrow is not None:
                between = _narrowed_route(between, rows.narrow, {id(own.runs): runs})
            self.decide(h, between)
            if rows.narrow is not None:
                rows.narrow.put(own.runs, runs)
        chosen = self.ops.choose_rows(runs)
        return self.ops.feed(h, [self.part()], chosen=chosen)[0], chosen


@dataclass(frozen=True)
class GraphNodeBlock(GuardedBlock):
    """A ``GuardedBlock`` whose guarded sublayers are bodies of graph nodes."""

    bodies: Bodies = field(kw_only=True)

    @classmethod
    def of(cls, block: FusedBlock, bodies: Bodies) -> Self:
        """The same layer with ``bodies``."""
        own = {each.name: getattr(block, each.name) for each in fields(FusedBlock)}
        return cls(**own, bodies=bodies)


def is_one_decision(rows: FusedRows) -> bool:
    """Whether one flag decides on the whole block, before it begins."""
    attention, ffn = rows.attention, rows.ffn
    if attention is None or ffn is None or attention.runs is not ffn.runs:
        return False
    return rows.then_attention is None and ffn.between is None


def leaves_entries(own: GuardedAttention) -> bool:
    """Whether rows that do not attend leave entries."""
    return own.leaves_all or bool(own.copies)


def _narrowed_route(route: Route, narrow: Selection, runs: dict[int, Tensor]) -> Route:
    """The same decisions on the rows that continue; ``runs``: their flags, by id of all rows'."""
    trace = route.trace
    return replace(
        route,
        verdicts=[
            replace(
                verdict,
                runs=runs.get(id(verdict.runs), narrow.take(verdict.runs)),
                candidates=narrow.take(verdict.candidates),
            )
            for verdict in route.verdicts
        ],
        positions=narrow.take(route.positions),
        sequences=narrow.take(route.sequences),
        trace=trace and replace(trace, found=narrow.take(trace.found)),
    )
