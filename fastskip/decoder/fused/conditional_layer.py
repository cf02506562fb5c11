"""A guarded decoder layer whose sublayers are skipped entirely if no row of a step runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fastskip.decoder.fused.guarded_layer import GraphNodeBlock, is_one_decision, leaves_entries
from fastskip.decoder.fused.layer import NO_READERS, Readers
from fastskip.decoder.fused.parts import FusedRows, GuardedAttention, Store, Stream
from fastskip.ops.bodies import Body
from fastskip.ops.contracts import Norm, Term
from fastskip.policy import Arrangement


@dataclass(frozen=True)
class IfBlock(GraphNodeBlock):
    """A ``GuardedBlock`` for decode steps whose sublayers are conditional ``bodies``.

    Its launches are those of a ``GuardedBlock``, since some rows may run and others not. What
    skipping rows need is never in a body: the entries that they leave, and decisions, which
    therefore take launches of their own where they would ride in an update. One flag for the whole
    block makes one body; the two sublayers of a parallel block share launches, so they get a body
    only if they share the flag too and skipping rows leave no entries.
    """

    def run(
        self, stream: Stream, rows: FusedRows, store: Store, readers: Readers = NO_READERS
    ) -> Stream:
        h, own = stream.h, rows.attention
        if own is None or not is_one_decision(rows):
            return super().run(stream, rows, store, readers)
        is_parallel = self.plan.arrangement is Arrangement.PARALLEL
        if is_parallel and leaves_entries(own):
            return super().run(stream, rows, store, readers)
        self.decide(h, rows.before)
        alone = replace(rows, before=None, then_attention=None, then_ffn=None)
        if is_parallel:
            self.bodies.run_if(own.runs, lambda: self.run_parallel(h, alone, store))
        else:
            attend = self._attention(h, alone, own, store)
            feed = super().run_ffn
            self.bodies.run_if(own.runs, lambda: (attend(), feed(Stream(h), alone, None)))
        self.decide(h, rows.then_ffn)
        return Stream(h)

    def run_attention(
        self, stream: Stream, rows: FusedRows, store: Store, reader: Norm | None
    ) -> Stream:
        h, own = stream.h, rows.attention
        if own is None:
            return super().run_attention(stream, rows, store, reader)
        self.bodies.run_if(own.runs, self._attention(h, rows, own, store))
        self.decide(h, rows.then_attention)
        return Stream(h)

    def run_ffn(self, stream: Stream, rows: FusedRows, reader: Norm | None) -> Stream:
        h, own = stream.h, rows.ffn
        if own is None:
            return super().run_ffn(stream, rows, reader)
        self.decide(h, own.between)
        alone = replace(rows, ffn=replace(own, between=None), then_ffn=None)
        feed = super().run_ffn
        self.bodies.run_if(own.runs, lambda: feed(Stream(h), alone, None))
        self.decide(h, rows.then_ffn)
        return Stream(h)

    def _attention(self, h: Tensor, rows: FusedRows, own: GuardedAttention, store: Store) -> Body:
        """The attention's body; entries are stored outside it, here, if skipping rows leave any."""
        made = self._project_guarded(h, rows, own, store) if leaves_entries(own) else None

        def body() -> None:
            queries = made or self._project_guarded(h, rows, own, store)
            terms = [Term(self._attend_guarded(queries, store), self.weights.output)]
            self.add_chosen(h, terms, [queries.chosen])

        return body
