"""The decoder: a loop over the plan's steps, each on the rows that the plan names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.anatomy import has_hooks, hooks_of, is_transformers_own
from fastskip.decoder.attention import pattern_of, sees_all
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.candidates import Attended, Lens
from fastskip.decoder.deep_features import DeepFeatures
from fastskip.decoder.entries import CachedEntries, Entries, GradientEntries, Maps
from fastskip.decoder.layer import Add, Block, BlockRows
from fastskip.decoder.module_state import ModuleState
from fastskip.decoder.positions import Turns, positions_of
from fastskip.decoder.recomputing import maybe_recomputed
from fastskip.decoder.removing import RowsLeft, may_leave
from fastskip.decoder.routed_rows import RoutedPlan, RoutedRows, narrows_after
from fastskip.decoder.weights import BlockWeights
from fastskip.ops import Operations
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import Combine, TokenClass
from fastskip.routing import Router, RoutingRecord
from fastskip.tokens import CODES, Rows, TokenLayout, add, add_

Watch = Callable[[int, Tensor], None]


class Decoder:
    """Runs one model's decoder layers under one plan.

    It reads the modules of the Hugging Face text model, which owns it: so it holds the text model
    weakly, and both go when their last user does.
    """

    def __init__(self, text_model: Any, plan: SkipPlan, ops: Operations) -> None:
        self.plan, self.ops = plan, ops
        self._text_model: Callable[[], Any] = _nothing
        self.weights = [
            BlockWeights(layer, plan.shape.head_dim, ops)
            for layer in text_model.layers[: plan.shape.depth]
        ]
        self.attach(text_model)
        self.routers: Sequence[Router] = ()
        # Who reads decisions back, and how rows become logits, where a router asks.
        self.record: RoutingRecord | None = None
        self.lens: Lens | None = None
        self._routed: RoutedPlan | None = None
        self._blocks: list[Block] = []
        # What blocks were made of.
        self._state: ModuleState | None = None
        self._planned: SkipPlan | None = None
        self._angles: object = None

    def __getstate__(self) -> dict[str, Any]:
        # Blocks hold views of merged storages; a copy makes its own when it is first used, and is
        # attached then.
        own: dict[str, Any] = {
            "_blocks": [],
            "_state": None,
            "record": None,
            "_routed": None,
            "_angles": None,
            "lens": None,
        }
        return {**self.__dict__, **own, "_text_model": _nothing, "positions": None}

    def attach(self, text_model: Any) -> None:
        """Reads this text model from now on: the one that the decoder was made for, or in a copy
        of it the copy."""
        if self._text_model() is not text_model:
            self._text_model = weakref.ref(text_model)
            self.positions = positions_of(self._text_model, self.ops.rotate)

    @property
    def like(self) -> Tensor:
        """A weight in the dtype and on the device of the residual stream."""
        weight: Tensor = self.weights[0].parts.attention_norm.weight
        return weight

    def refresh(self, *, wants_gradient: bool) -> None:
        """Once per forward or ``generate``: which layers may use merged projections.

        Raises:
            RuntimeError: a hook lies where the runtime never calls, or layers are fewer than the
                plan has.
        """
        self._follow_layers()
        if not wants_gradient and self._is_settled():
            return
        self._state = None
        for index, weights in enumerate(self.weights):
            for module in (weights.layer, weights.layer.self_attn):
                if has_hooks(module) and not all(map(is_transformers_own, hooks_of(module))):
                    raise RuntimeError(
                        f"layers[{index}]: a hook on a whole {type(module).__name__} is never "
                        "called here; allowed: hooks on its projections, its norms and its FFN, "
                        "or output_hidden_states=True"
                    )
            weights.refresh(wants_gradient=wants_gradient)
        self._blocks = [self._block(index) for index in range(len(self.weights))]
        self._planned = self.plan
        layers = [weights.layer for weights in self.weights]
        # In training, dropout may change from one forward to the next.
        if not wants_gradient and not any(layer.training for layer in layers):
            self._state = ModuleState(*layers)

    def _is_settled(self) -> bool:
        """Whether blocks are as the plan and the layers would make them."""
        is_of_plan = self._planned is self.plan
        return is_of_plan and self._state is not None and self._state.is_current()

    def _follow_layers(self) -> None:
        """Users may put other layers where the model's own were, and other angles."""
        text_model, depth = self._text_model(), self.plan.shape.depth
        assert text_model is not None
        layers = list(text_model.layers)[:depth]  # a slice would be a module of its own
        if len(layers) < depth:
            raise RuntimeError(
                f"layers: {len(layers)}; allowed: {depth}, as when the model was prepared (a "
                "policy leaves layers out)"
            )
        for index, layer in enumerate(layers):
            if self.weights[index].layer is not layer:
                self.weights[index] = BlockWeights(layer, self.plan.shape.head_dim, self.ops)
                self._state = None
        self._angles = self.positions.refresh()

    def unsupported(self) -> str | None:
        """Why this decoder cannot run the model; ``None`` if it can."""
        return None

    def new_cache(self, *, reserve: int = 0) -> SkipCache:
        """An empty cache for forwards as the last ``refresh`` left the decoder.

        ``reserve``: columns expected in all.
        """
        return SkipCache(self.plan, reserve=reserve)

    def check_places(self, positions: Tensor, columns: int) -> None:
        """Raises ``ValueError`` if one of ``positions [N]`` (host) is none, or if not every row of
        ``columns`` sees all that come before it."""
        self.positions.check(positions)
        window = self.plan.shape.window
        if window is not None and columns > window:
            raise ValueError(
                f"sliding_window: {columns} columns; allowed: at most {window}, beyond which rows "
                "would no longer see the first ones"
            )

    def room(self, cache: SkipCache) -> int:
        """How many steps there are places for behind what ``cache`` holds."""
        room = self.positions.room(int(cache.next_places().max()))
        window = self.plan.shape.window
        return room if window is None else min(room, max(0, window - cache.columns))

    def lay_out(
        self, codes: Tensor, positions: Tensor, cache: SkipCache, axes: Tensor | None = None
    ) -> TokenLayout:
        """The rows of a forward over columns ``[B, T]`` that come after the cache's."""
        return TokenLayout(codes, positions, cache.columns, self.plan.groups, axes=axes)

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
        maps: Maps | None = None,
        features: DeepFeatures | None = None,
    ) -> Tensor:
        """Runs every layer on the real columns of ``h``.

        Args:
            h: ``[B, T, D]`` embeddings, without positions; not written.
            layout: the rows, from ``lay_out``.
            cache: gets the new entries; may hold earlier columns.
            wanted: ``[n]`` flat indices into ``B * T`` of the only rows whose output is read (the
                last-layer rule), in output order; ``None``: all rows.
            wants_gradient: run out of place, so that autograd can follow.
            keeps_cache: whether anyone reads ``cache`` after this forward.
            watch: called with (layer, ``[N, D]``) for the input of every layer, before features
                enter, as Hugging Face shows hidden states.
            maps: told how rows attend in every layer.
            features: what enters image rows behind the first layers.
        Returns:
            The residual stream after the last layer: ``[N, D]`` in packed order, or ``[n, D]`` as
            wanted.
        """
        self.check_places(layout.positions, layout.first_column + layout.width)
        packed = self.positions.embed(layout.pack(h), layout.positions)
        entries: Entries
        if wants_gradient:
            cache.ends_gradients = True
            like = packed.detach() if keeps_cache else None
            entries = GradientEntries(self.plan, cache, layout, like)
        else:
            entries = CachedEntries(self.plan, cache, layout, packed)
        entries.maps = maps
        rotation = self.positions.turns(layout, packed)
        narrow = None if wanted is None else layout.locate(wanted)
        late = narrow if narrows_after(self.plan) else None
        if narrow is not None and may_leave(self.plan, layout, narrow):
            late = narrow
        narrow = None if late is not None else narrow
        static = _StepRows(self.plan, layout, entries, narrow)
        keeps_gone = watch is not None or wanted is None or late is not None
        rest = RowsLeft(self.plan, self._blocks, layout, rotation, entries, keeps_gone=keeps_gone)
        routed = None
        if self.plan.routed:
            routed = self._route(layout, cache, entries, narrow, static.of, rotation)
        combine = add if wants_gradient else add_
        removing = {rule.after_layer for rule in self.plan.removals}
        placed = None if features is None else features.among(layout)
        before: tuple[int, ...] = ()
        for step in self.plan.steps:
            blocks = [self._blocks[index] for index in step]
            if watch is not None:
                for index in step:
                    watch(index, rest.whole(packed))
            if placed is not None:
                packed = placed.enter(before, packed, combine)
            if routed is not None:
                routed.enter(step, packed)
            rest.look(step[-1], packed)
            rows_of = static.of if routed is None else routed.of
            inputs = [rows_of(block.plan, step is self.plan.steps[-1]) for block in blocks]
            runs = [
                maybe_recomputed(
                    block.run if len(step) == 1 else block.change,
                    self.weights[index].layer,
                    index,
                    entries,
                )
                for index, block in zip(step, blocks, strict=True)
            ]
            if len(step) == 1:
                packed = runs[0](packed, inputs[0], rest.rotation, entries, combine)
            else:
                plans = [block.plan for block in blocks]
                packed = _run_pair(packed, plans, runs, inputs, rest.rotation, entries, combine)
            before = step
            if step[-1] in removing:
                if placed is not None:
                    before, packed = (), placed.enter(step, packed, combine)
                whole, packed = rest.layout, rest.remove(step[-1], packed)
                if rest.layout is not whole:
                    narrow = (
                        None if narrow is None or wanted is None else rest.layout.locate(wanted)
                    )
                    static = _StepRows(self.plan, rest.layout, entries, narrow)
                    placed = None if features is None else features.among(rest.layout)
        cache.commit(layout, entries.held, entries.left)
        if self.record is not None and (routed is not None or self.plan.removals):
            self.record.forwards.append(
                rest.decisions(self.plan) if routed is None else routed.decisions()
            )
        if wanted is not None and late is None:
            return packed
        return rest.whole(packed) if late is None else late.take(rest.whole(packed))

    def _route(
        self,
        layout: TokenLayout,
        cache: SkipCache,
        entries: Entries,
        narrow: Rows | None,
        static: Callable[[LayerPlan, bool], BlockRows],
        rotation: Turns,
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
        parts = weights.parts
        return Block(
            weights.products,
            self.plan.layers[index],
            self.ops,
            parts.attention.scaling,
            parts.attention_dropout,
            self.plan.shape.head_dim,
        )


def _nothing() -> None:
    """A text model that is not there yet."""


def _run_pair(
    h: Tensor,
    plans: Sequence[LayerPlan],
    changes: Sequence[Callable[..., Tensor]],
    inputs: Sequence[BlockRows],
    rotation: Turns,
    entries: Entries,
    combine: Add,
) -> Tensor:
    """Two layers: paired rows read the same ``h`` in both, others run one after the other.

    Paired: ``out = h + d1 + d2``, or the mean of the two changes. Where they keep the mean of their
    K and V, paired rows read the first layer's cache in both.
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


class _StepRows:
    """The ``BlockRows`` of one forward; layers that do the same share them."""

    def __init__(
        self, plan: SkipPlan, layout: TokenLayout, entries: Entries, narrow: Rows | None
    ) -> None:
        self._plan, self._layout, self._entries, self._narrow = plan, layout, entries, narrow
        self._made: dict[tuple[object, ...], BlockRows] = {}
        # Of the last layer, whose rows are few: their codes, and which of them are of some classes.
        self._narrow_codes: list[int] | None = None
        self._narrow_rows: dict[frozenset[TokenClass], Rows] = {}

    def of(self, layer: LayerPlan, is_last: bool) -> BlockRows:
        narrow = self._narrow if is_last else None
        # A hollow layer has slots of its own, which matter to those who look at some of them.
        count = self._going_on(layer.attending, narrow).count if layer.hollow else 0
        looks = count and not sees_all(layer, self._layout, count)
        key = (layer.row_sets, layer.table if looks else None, narrow is not None)
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
        pattern = None
        if attending.count:
            queries = attending.through(narrow)
            pattern = pattern_of(layer, self._layout, queries, self._entries)
        is_pair = layer.partner is not None
        paired = layer.arranged if is_pair else frozenset()
        return BlockRows(
            joint=joint,
            stored=stored,
            raw=rows(layer.leaving_hidden),
            reused=tuple((source, copied) for source, copied in reused if copied.count),
            narrow=narrow,
            attending=attending,
            replaced=self._going_on(layer.replaced, narrow),
            feeding=self._going_on(layer.feeding - layer.beside, narrow),
            beside=self._going_on(layer.beside, narrow),
            paired=self._going_on(paired, narrow),
            alone=self._going_on(layer.attending - paired if is_pair else frozenset(), narrow),
            merged=rows(paired),
            pattern=pattern,
        )

    def _going_on(self, classes: frozenset[TokenClass], narrow: Rows | None) -> Rows:
        """The rows of some classes among those that go on, indexing those."""
        if narrow is None:
            return self._layout.rows(classes)
        found = self._narrow_rows.get(classes)
        if found is None:
            found = self._narrow_rows[classes] = self._among(narrow, classes)
        return found

    def _among(self, narrow: Rows, classes: frozenset[TokenClass]) -> Rows:
        if self._narrow_codes is None:
            self._narrow_codes = narrow.take(self._layout.codes).tolist()
        wanted = {CODES[token_class] for token_class in classes}
        index = [row for row, code in enumerate(self._narrow_codes) if code in wanted]
        if len(index) == len(self._narrow_codes):
            return Rows(slice(0, len(index)), len(index))
        return Rows(torch.tensor(index, dtype=torch.int64), len(index))
