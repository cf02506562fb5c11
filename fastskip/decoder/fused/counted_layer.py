"""A guarded decoder layer for captured prompts, with bodies for different numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fastskip.decoder.fused.guarded_layer import GraphNodeBlock, Queries, is_one_decision
from fastskip.decoder.fused.layer import NO_READERS, Readers
from fastskip.decoder.fused.parts import FusedRows, GuardedAttention, Store, Stream
from fastskip.ops.bodies import CountedBody
from fastskip.ops.contracts import Norm, Projection, Reach, StepReach, Term
from fastskip.ops.routes import Chosen
from fastskip.policy import Arrangement


@dataclass(frozen=True)
class SwitchBlock(GraphNodeBlock):
    """A ``GuardedBlock`` whose GEMMs over chosen rows have sizes that the host knows.

    On an H200, for a 7B model's prompt, library GEMMs of known size run at 1.3 to 2 times the rate
    of kernels that read the number of rows on the device; a SWITCH node costs 8 us. What skipping
    rows need is never in a body: the entries that they leave, and decisions. One flag for the whole
    block makes one node; otherwise each sublayer is one.
    """

    def run(
        self, stream: Stream, rows: FusedRows, store: Store, readers: Readers = NO_READERS
    ) -> Stream:
        h, own = stream.h, rows.attention
        if own is None or rows.narrow is not None or not is_one_decision(rows):
            return super().run(stream, rows, store, readers)
        self.decide(h, rows.before)
        projection, reach = self._project_entries(h, rows, own, store)

        def parallel(chosen: Chosen) -> None:
            queries, fed = self.ops.project_append_feed(
                h, projection, self.part(), chosen=(chosen, chosen)
            )
            terms = [self._mixed(queries, chosen, reach, store), Term(fed, self.weights.down)]
            self.add_chosen(h, terms, [chosen, chosen])

        def sequential(chosen: Chosen) -> None:
            self._add_attention(h, chosen, projection, reach, store)
            self._add_ffn(h, chosen)

        is_parallel = self.plan.arrangement is Arrangement.PARALLEL
        body = parallel if is_parallel else sequential
        self._run_counted(own.runs, body)
        self.decide(h, rows.then_ffn)
        return Stream(h)

    def run_attention(
        self, stream: Stream, rows: FusedRows, store: Store, reader: Norm | None
    ) -> Stream:
        h, own = stream.h, rows.attention
        if own is None or rows.narrow is not None:
            return super().run_attention(stream, rows, store, reader)
        projection, reach = self._project_entries(h, rows, own, store)
        self._run_counted(
            own.runs, lambda chosen: self._add_attention(h, chosen, projection, reach, store)
        )
        self.decide(h, rows.then_attention)
        return Stream(h)

    def run_ffn(self, stream: Stream, rows: FusedRows, reader: Norm | None) -> Stream:
        h, own = stream.h, rows.ffn
        if own is None or rows.narrow is not None:
            return super().run_ffn(stream, rows, reader)
        self.decide(h, own.between)
        self._run_counted(own.runs, lambda chosen: self._add_ffn(h, chosen))
        self.decide(h, rows.then_ffn)
        return Stream(h)

    def _run_counted(self, runs: Tensor, body: CountedBody) -> None:
        self.bodies.run_counted(runs, self.ops.choose_rows, body)

    def _project_entries(
        self, h: Tensor, rows: FusedRows, own: GuardedAttention, store: Store
    ) -> tuple[Projection, Reach | StepReach]:
        """Stores the entries that depend on no decision; returns what is left to project, and what
        rows see."""
        targets, reach = self._placed(own, rows)
        projection = self.projection(targets, store)
        if own.leaves_all:
            self._leave_all(h, targets, store)
            projection = self.projection(targets, store, linear=self.weights.queries, leaves=False)
        self._copy(own, targets, store)
        return replace(projection, leaves_all=False), reach

    def _add_attention(
        self,
        h: Tensor,
        chosen: Chosen,
        projection: Projection,
        reach: Reach | StepReach,
        store: Store,
    ) -> None:
        queries = self.ops.project_append(h, [projection], chosen=chosen)[0]
        self.add_chosen(h, [self._mixed(queries, chosen, reach, store)], [chosen])

    def _add_ffn(self, h: Tensor, chosen: Chosen) -> None:
        fed = self.ops.feed(h, [self.part()], chosen=chosen)[0]
        self.add_chosen(h, [Term(fed, self.weights.down)], [chosen])

    def _mixed(
        self, queries: Tensor, chosen: Chosen, reach: Reach | StepReach, store: Store
    ) -> Term:
        """The attention's term of the residual update."""
        mixed = self._attend_guarded(Queries(queries, chosen, reach), store)
        if chosen.bound is not None and chosen.index is not None:
            mixed = mixed.index_select(0, chosen.index)
        return Term(mixed, self.weights.output)
