"""The decoder: one model's current layers, and forwards through them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastskip.decoder.anatomy import hooks_of, is_transformers_own
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.candidates import Attended, Lens
from fastskip.decoder.entries import CachedEntries, Entries, GradientEntries
from fastskip.decoder.layer import Block
from fastskip.decoder.module_state import ModuleState
from fastskip.decoder.plain_forward import DEFAULTS, ForwardOptions, PlainForward
from fastskip.decoder.positions import positions_of
from fastskip.decoder.routed_rows import RoutedPlan, RoutedRows
from fastskip.decoder.weights import BlockWeights
from fastskip.ops import Operations
from fastskip.plan import SkipPlan
from fastskip.routing import Router, RoutingRecord
from fastskip.tokens import TokenLayout, add, add_


class Decoder:
    """Runs one model's decoder layers under one plan.

    It reads the modules of the Hugging Face text model, which owns it, so it references that model
    weakly: both are freed with their last user.
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
        # Where decisions are recorded, and how rows become logits, for routers that need them.
        self.record: RoutingRecord | None = None
        self.lens: Lens | None = None
        self._routed: RoutedPlan | None = None
        self._blocks: list[Block] = []
        # What the blocks were made of.
        self._state: ModuleState | None = None
        self._planned: SkipPlan | None = None
        self._angles: object = None

    def __getstate__(self) -> dict[str, Any]:
        # Blocks hold views of merged storages; a copy makes its own on first use, when it is
        # attached.
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
        """Reads this text model from now on: the one that the decoder was made for or, in a copy,
        the model's copy."""
        if self._text_model() is not text_model:
            self._text_model = weakref.ref(text_model)
            self.positions = positions_of(self._text_model, self.ops.rotate)

    @property
    def like(self) -> Tensor:
        """A weight in the dtype and on the device of the residual stream."""
        weight: Tensor = self.weights[0].parts.attention_norm.weight
        return weight

    def refresh(self, *, wants_gradient: bool) -> None:
        """Determines, once per forward or ``generate``, which layers may use merged projections.

        Raises:
            RuntimeError: a module that the runtime never calls has a hook, or there are fewer
                layers than the plan has.
        """
        self._follow_layers()
        if not wants_gradient and self._is_settled():
            return
        self._state = None
        for index, weights in enumerate(self.weights):
            for module in (weights.layer, weights.layer.self_attn):
                if not all(map(is_transformers_own, hooks_of(module))):
                    raise RuntimeError(
                        f"layers[{index}]: a hook on a whole {type(module).__name__} is never "
                        "called; allowed: hooks on its projections, norms and FFN, or "
                        "output_hidden_states=True instead"
                    )
            weights.refresh(wants_gradient=wants_gradient)
        self._blocks = [self._block(index) for index in range(len(self.weights))]
        self._planned = self.plan
        layers = [weights.layer for weights in self.weights]
        # In training, dropout may change from one forward to the next.
        if not wants_gradient and not any(layer.training for layer in layers):
            self._state = ModuleState(*layers)

    def _is_settled(self) -> bool:
        """Whether the blocks are still what the plan and the layers would make."""
        is_of_plan = self._planned is self.plan
        return is_of_plan and self._state is not None and self._state.is_current()

    def _follow_layers(self) -> None:
        """Picks up layers, and RoPE angles, that users have replaced."""
        text_model, depth = self._text_model(), self.plan.shape.depth
        assert text_model is not None
        layers = list(text_model.layers)[:depth]  # slicing a ModuleList makes a new module
        if len(layers) < depth:
            raise RuntimeError(
                f"layers: {len(layers)}; allowed: {depth}, as when the model was prepared (to "
                "skip layers, use a policy)"
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
        """An empty cache for forwards after the last ``refresh``.

        ``reserve``: columns expected in total.
        """
        return SkipCache(self.plan, reserve=reserve)

    def check_places(self, positions: Tensor, columns: int) -> None:
        """Raises ``ValueError`` if one of ``positions [N]`` (host) does not exist, or if some of
        ``columns`` would not see all columns before them."""
        self.positions.check(positions)
        window = self.plan.shape.window
        if window is not None and columns > window:
            raise ValueError(
                f"sliding_window: {columns} columns; allowed: at most {window}, since later rows "
                "would no longer see the first columns"
            )

    def room(self, cache: SkipCache) -> int:
        """How many decode steps there are positions for after what ``cache`` holds."""
        room = self.positions.room(int(cache.seen.next_places().max()))
        window = self.plan.shape.window
        return room if window is None else min(room, max(0, window - cache.columns))

    def lay_out(
        self, codes: Tensor, positions: Tensor, cache: SkipCache, axes: Tensor | None
    ) -> TokenLayout:
        """The rows of a forward over columns ``[B, T]`` that come after the cache's."""
        return TokenLayout(codes, positions, cache.columns, self.plan.groups, axes=axes)

    def run(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: SkipCache,
        options: ForwardOptions = DEFAULTS,
    ) -> Tensor:
        """Runs every layer on the real columns of ``h``.

        Args:
            h: ``[B, T, D]`` embeddings, without positions; not written.
            layout: the rows, from ``lay_out``.
            cache: gets the new entries; may hold earlier columns.
        Returns:
            The residual stream after the last layer: ``[N, D]`` in packed order, or ``[n, D]`` as
            wanted.
        """
        self.check_places(layout.positions, layout.first_column + layout.width)
        packed = self.positions.embed(layout.pack(h), layout.positions)
        entries: Entries
        if options.wants_gradient:
            cache.ends_gradients = True
            like = packed.detach() if options.keeps_cache else None
            entries = GradientEntries(self.plan, cache, layout, like)
        else:
            entries = CachedEntries(self.plan, cache, layout, packed)
        entries.maps = options.maps
        forward = PlainForward(
            self.plan,
            self._blocks,
            [weights.layer for weights in self.weights],
            layout,
            self.positions.turns(layout, packed),
            entries,
            add if options.wants_gradient else add_,
            options,
        )
        if self.plan.routed:
            forward.routed = self._route(forward, cache, entries)
        output = forward.run(packed)
        cache.commit(layout, entries.held, entries.left)
        if self.record is not None and (self.plan.routed or self.plan.removals):
            self.record.forwards.append(forward.decisions())
        return output

    def _route(self, forward: PlainForward, cache: SkipCache, entries: Entries) -> RoutedRows:
        """The rows of a forward in which routers decide."""
        attended = None
        if any(getattr(router, "uses_attention", False) for router in self.routers):
            attended = Attended(self._blocks, forward.rotation, entries)
        if self._routed is None or not self._routed.is_of(self.plan, self.routers):
            self._routed = RoutedPlan(self.plan, self.routers)
        return RoutedRows(
            self._routed,
            forward.layout,
            cache,
            entries,
            forward.narrow,
            forward.static.of,
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
    """Stands for a text model that is not attached yet."""
