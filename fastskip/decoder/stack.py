"""The decoder: a loop over the plan's steps, each on the rows that the plan names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.attention import AttentionPattern
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.candidates import Attended
from fastskip.decoder.entries import CachedEntries, Entries, GradientEntries
from fastskip.decoder.layer import Block, BlockRows, Rotation
from fastskip.decoder.recomputing import maybe_recomputed
from fastskip.decoder.rope import RotaryTable
from fastskip.decoder.routed_rows import RoutedPlan, RoutedRows, narrows_after
from fastskip.decoder.weights import BlockWeights, has_hooks
from fastskip.ops import Operations
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import Combine, TokenClass
from fastskip.routing import Router, RoutingRecord
from fastskip.tokens import CODES, Rows, TokenLayout, add, add_

Watch = Callable[[int, Tensor], None]


class Decoder:
    """Runs one model's decoder layers under one plan.

    It reads the modules of the Hugging Face text model and owns none of them.
    """

    def __init__(self, text_model: Any, plan: SkipPlan, ops: Operations) -> None:
        self.plan, self.ops = plan, ops
        self.text_model = text_model
        self.weights = [
            BlockWeights(layer, plan.shape.head_dim, ops)
            for layer in text_model.layers[: plan.shape.depth]
        ]
        self.rotary = RotaryTable(text_model.rotary_emb)
        self.routers: Sequence[Router] = ()
        # Who reads decisions back, and how rows become logits, where a router asks.
        self.record: RoutingRecord | None = None
        self.lens: Callable[[Tensor], Tensor] | None = None
        self._routed: RoutedPlan | None = None
        self._blocks: list[Block] = []

    def __getstate__(self) -> dict[str, Any]:
        # Blocks hold views of merged storages; a copy makes its own when it is first used.
        return {**self.__dict__, "_blocks": [], "record": None, "_routed": None}

    def refresh(self, *, wants_gradient: bool) -> None:
        """Once per forward or ``generate``: which layers may use merged projections.

        Raises:
            RuntimeError: a hook lies where the runtime never calls.
        """
        for index, weights in enumerate(self.weights):
            for module in (weights.layer, weights.layer.self_attn):
                if has_hooks(module):
                    raise RuntimeError(
                        f"layers[{index}]: a hook on a whole {type(module).__name__} is never "
                        "called here; allowed: hooks on its projections, its norms and its FFN, "
                        "or output_hidden_states=True"
                    )
            weights.refresh(wants_gradient=wants_gradient)
        self._blocks = [self._block(index) for index in range(len(self.weights))]

    def unsupported(self) -> str | None:
        """Why this decoder cannot run the model; ``None`` if it can."""
        return None

    def new_cache(self, *, reserve: int = 0, wants_gradient: bool = False) -> SkipCache:
        """An empty cache for forwards of this decoder; ``reserve``: columns expected in all."""
        return SkipCache(self.plan, reserve=reserve)

    def lay_out(self, codes: Tensor, positions: Tensor, cache: SkipCache) -> TokenLayout:
        """The rows of a forward over columns ``[B, T]`` that come after the cache's."""
        return TokenLayout(codes, positions, cache.columns, self.plan.groups)

    def run(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: SkipCache,
        *,
        wanted: Tensor | None = None,
        wants_gradient: bool = False,
        keeps_cache: bool = True,
        watch: Watch | None = None,
    ) -> Tensor:
        """Runs every layer on the real columns of ``h``.

        Args:
            h: ``[B, T, D]`` embeddings; not written.
            layout: the rows, from ``lay_out``.
            cache: gets the new entries; may hold earlier columns.
            wanted: ``[n]`` flat indices into ``B * T`` of the only rows whose output is read (the
                last-layer rule), in output order; ``None``: all rows.
            wants_gradient: run out of place, so that autograd can follow.
            keeps_cache: whether anyone reads ``cache`` after this forward.
            watch: called with (layer, ``[N, D]``) for the input of every layer.
        Returns:
            The residual stream after the last layer: ``[N, D]`` in packed order, or ``[n, D]`` as
            wanted.
        """
        packed = layout.pack(h)
        entries: Entries
        if wants_gradient:
            like = packed.detach() if keeps_cache else None
            entries = GradientEntries(self.plan, cache, layout, like)
        else:
            entries = CachedEntries(self.plan, cache, layout, packed)
        cosine, sine = self.rotary.at(layout.positions, packed)
        rotation = Rotation(cosine, sine)
        narrow = None if wanted is None else layout.locate(wanted)
        late = narrow if narrows_after(self.plan) else None
        narrow = None if late is not None else narrow
        static = _StepRows(self.plan, layout, entries, narrow)
        routed = None
        if self.plan.routed:
            routed = self._route(layout, cache, entries, narrow, static.of, rotation)
        combine = add if wants_gradient else add_
        for step in self.plan.steps:
            blocks = [self._blocks[index] for index in step]
            if routed is not None:
                routed.enter(step, packed)
            rows_of = static.of if routed is None else routed.of
            inputs = [rows_of(block.plan, step is self.plan.steps[-1]) for block in blocks]
            if watch is not None:
                for index in step:
                    watch(index, packed)
            if len(blocks) == 1:
                run = maybe_recomputed(blocks[0].run, self.weights[step[0]].layer, step[0], entries)
                packed = run(packed, inputs[0], rotation, entries, combine)
                continue
            changes = [
                maybe_recomputed(block.change, self.weights[index].layer, index, entries)(
                    packed, own, rotation, entries
                )
                for index, block, own in zip(step, blocks, inputs, strict=True)
            ]
            change = changes[0] + changes[1]
            change = change / 2 if blocks[0].plan.combine is Combine.MEAN else change
            packed = packed if inputs[0].narrow is None else inputs[0].narrow.take(packed)
            packed = combine(packed, inputs[0].attending, change)
        cache.commit(layout, entries.held)
        if routed is not None and self.record is not None:
            self.record.forwards.append(routed.decisions())
        return packed if late is None else late.take(packed)

    def _route(
        self,
        layout: TokenLayout,
        cache: SkipCache,
        entries: Entries,
        narrow: Rows | None,
        static: Callable[[LayerPlan, bool], BlockRows],
        rotation: Rotation,
    ) -> RoutedRows:
        attended = None
        if any(getattr(router, "uses_attention", False) for router in self.routers):
            attended = Attended(dict(enumerate(self._blocks)), {}, rotation, entries)
        if self._routed is None or not self._routed.is_of(self.plan, self.routers):
            self._routed = RoutedPlan(self.plan, self.routers)
        return RoutedRows(
            self._routed,
            layout,
            cache,
            entries,
            narrow,
            static,
            lens=self.lens,
            attended=attended,
        )

    def _block(self, index: int) -> Block:
        weights = self.weights[index]
        attention = weights.layer.self_attn
        dropout = float(attention.attention_dropout) if weights.layer.training else 0.0
        return Block(
            weights.products, self.plan.layers[index], self.ops, attention.scaling, dropout
        )


class _StepRows:
    """The ``BlockRows`` of one forward; layers that do the same share them."""

    def __init__(
        self, plan: SkipPlan, layout: TokenLayout, entries: Entries, narrow: Rows | None
    ) -> None:
        self._plan, self._layout, self._entries, self._narrow = plan, layout, entries, narrow
        self._made: dict[tuple[object, ...], BlockRows] = {}

    def of(self, layer: LayerPlan, is_last: bool) -> BlockRows:
        narrow = self._narrow if is_last else None
        # A hollow layer has slots of its own.
        key = (layer.row_sets, layer.table if layer.hollow else None, narrow is not None)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(layer, narrow)
        return found

    def _make(self, layer: LayerPlan, narrow: Rows | None) -> BlockRows:
        rows = self._layout.rows
        joint = rows(layer.attending) if narrow is None else rows(frozenset())
        stored = rows(layer.projecting - layer.attending if narrow is None else layer.projecting)
        reused = tuple((source, rows(classes)) for source, classes in layer.reusing.items())
        attending = self._going_on(layer.attending, narrow)
        pattern = self._pattern(layer, attending, narrow) if attending.count else None
        return BlockRows(
            joint=joint,
            stored=stored,
            reused=tuple((source, copied) for source, copied in reused if copied.count),
            narrow=narrow,
            attending=attending,
            feeding=self._going_on(layer.feeding, narrow),
            pattern=pattern,
        )

    def _going_on(self, classes: frozenset[TokenClass], narrow: Rows | None) -> Rows:
        """The rows of some classes among those that go on, indexing those."""
        if narrow is None:
            return self._layout.rows(classes)
        codes = narrow.take(self._layout.codes)
        wanted = torch.tensor(sorted(CODES[token_class] for token_class in classes))
        index = torch.isin(codes, wanted).nonzero().squeeze(1)
        if len(index) == len(codes):
            return Rows(slice(0, len(codes)), len(codes))
        return Rows(index, len(index))

    def _pattern(self, layer: LayerPlan, attending: Rows, narrow: Rows | None) -> AttentionPattern:
        layout = self._layout
        batch = layout.batch
        if layout.is_step and attending.count == batch:
            return AttentionPattern.newest(batch, layer.index, self._entries)
        sequences, columns = layout.sequences, layout.columns
        if narrow is not None:
            sequences, columns = narrow.take(sequences), narrow.take(columns)
        sequences, columns = attending.take(sequences), attending.take(columns)
        return AttentionPattern.of(sequences, columns, batch, layer.index, self._entries)
