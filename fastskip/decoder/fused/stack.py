"""The decoder on the fused operations: what runs on CUDA.

It runs the same plan as ``decoder.stack.Decoder`` and falls back to it where the fused operations
are not defined: when gradients are wanted, and while a layer's projections cannot be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.fused.captured_forward import (
    MOST_ROWS,
    CapturedForward,
    CapturedForwards,
    ForwardShape,
    Layers,
)
from fastskip.decoder.fused.forward_rows import ForwardRows
from fastskip.decoder.fused.guarded_layer import GuardedBlock
from fastskip.decoder.fused.layer import FusedBlock
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.parts import Store
from fastskip.decoder.fused.routes import decisions_of
from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.fused.rows import sender
from fastskip.decoder.fused.sizes import rounded_rows
from fastskip.decoder.fused.staged_forward import Ran, StagedForward
from fastskip.decoder.fused.steps import run_steps
from fastskip.decoder.fused.support import unsupported_plan
from fastskip.decoder.guards import narrows_after
from fastskip.decoder.plain_forward import DEFAULTS, ForwardOptions
from fastskip.decoder.stack import Decoder
from fastskip.ops import Implementation, Operations
from fastskip.ops.contracts import Linear, Norm
from fastskip.ops.operations import FusedOperations
from fastskip.ops.ranges import ranges_enabled, span
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Table
from fastskip.tokens import TokenLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class FusedDecoder(Decoder):
    """Runs one model's decoder layers under one plan, in place and in few launches.

    ``version`` counts changes of the plan or the weights' addresses: a captured graph is valid for
    one version. ``flash``: flash-attn's function for prompts, if requested.
    """

    def __init__(self, text_model: Any, plan: SkipPlan, ops: Operations) -> None:
        super().__init__(text_model, plan, ops)
        self.flash: Callable[..., Any] | None = None
        self.version = 0
        self.captured = CapturedForwards()
        self._fused_blocks: list[FusedBlock] = []
        self._made_of: list[object] = []
        self._settled: tuple[object, ...] = ()
        self._addresses: tuple[int, ...] = ()
        self._scales: list[float] = []
        self._anchor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Blocks, and the graphs made of them, hold addresses; a copy starts without any.
        own: dict[str, Any] = {"_fused_blocks": [], "_made_of": [], "_anchor": None}
        own["_settled"] = ()
        own["captured"] = CapturedForwards(self.captured.switches)
        return {**super().__getstate__(), **own}

    @property
    def fused(self) -> FusedOperations:
        assert self.ops.fused is not None
        return self.ops.fused

    @property
    def anchor(self) -> Tensor:
        """The tensor that page addresses are relative to; replaced if dtype or device change."""
        like = self.like
        held = self._anchor
        if held is None or (held.dtype, held.device) != (like.dtype, like.device):
            held = self._anchor = torch.zeros(16, dtype=like.dtype, device=like.device)
        return held

    def unsupported(self) -> str | None:
        """Why the kernels cannot run this model at all; ``None`` if they can.

        Conditions that vary from call to call (gradients, hooks, adapters) do not count.
        """
        dtype, shape = self.like.dtype, self.plan.shape
        if self.ops.implementation is Implementation.TRITON:
            if dtype not in DTYPES:
                return f"dtype {dtype}; supported: bfloat16, float16, float32"
            if shape.head_dim % 8 or shape.head_dim > 256:
                return f"head_dim {shape.head_dim}; supported: multiples of 8 up to 256"
            if shape.hidden_size % 8 or shape.ffn_size % 8:
                sizes = f"{shape.hidden_size}, {shape.ffn_size}"
                return f"hidden and FFN size {sizes}; supported: multiples of 8"
        merged = [weights.merged for weights in self.weights]
        if any(own is not None and not own.is_fusable for own in merged):
            allowed = "gated SiLU or plain ReLU; RMS norms of heads"
            return f"activation of the FFN, or a norm of heads; supported: {allowed}"
        return self.unsupported_plan(self.plan)

    def unsupported_plan(self, plan: SkipPlan) -> str | None:
        """Why the kernels cannot run a plan on this model; ``None`` if they can."""
        reason = unsupported_plan(plan)
        if reason is not None:
            return reason
        for step in plan.steps:
            numbers = [self.weights[index].parts.multiplier for index in step]
            if len(set(numbers)) > 1:
                return f"residual_multiplier {numbers} in the pair {step}; supported: equal ones"
        return None

    @property
    def is_fused(self) -> bool:
        """Whether forwards without gradients currently run on the fused operations."""
        return bool(self._fused_blocks)

    @property
    def blocks(self) -> Sequence[FusedBlock]:
        """The layers as the fused operations run them; invalid after the next ``refresh``."""
        return self._fused_blocks

    def addresses(self) -> tuple[int, ...]:
        """Addresses, at the last ``refresh``, of the weights that graphs read: a parameter's data
        may be replaced."""
        table = self.positions.table
        return self._addresses if table is None else (*self._addresses, table.data_ptr())

    def refresh(self, *, wants_gradient: bool) -> None:
        super().refresh(wants_gradient=wants_gradient)
        if wants_gradient or _is_cast(self.like):
            self._fused_blocks = []
            return
        settled = (self._blocks, self.plan, self._angles)
        if self._fused_blocks and all(map(is_, settled, self._settled)):
            return
        self._settled = settled
        self._make_blocks()
        self._addresses = _addresses_of(self._fused_blocks)

    def _make_blocks(self) -> None:
        merged = [weights.merged for weights in self.weights]
        drops = any(block.dropout for block in self._blocks)
        made_of: list[object] = [self.plan, self.like.dtype, drops, self._angles, *merged]
        scales = [block.scale for block in self._blocks]
        if (
            self._fused_blocks
            and all(a is b for a, b in zip(made_of, self._made_of, strict=True))
            and scales == self._scales
        ):
            return
        self.version += 1
        self._made_of, self._scales = made_of, scales
        self._fused_blocks = []
        if drops or self.unsupported() is not None:  # for instance, moved to another dtype
            return
        tensors = [own.weights for own in merged if own is not None and own.is_fusable]
        head_dim = self.plan.shape.head_dim
        if len(tensors) == len(merged):
            self._fused_blocks = [
                GuardedBlock(own, block.plan, self.fused, block.scale, head_dim, self.flash)
                for own, block in zip(tensors, self._blocks, strict=True)
            ]

    def new_cache(self, *, reserve: int = 0) -> SkipCache:
        if not self.is_fused:
            return super().new_cache(reserve=reserve)
        return PagedCache(self.plan, self.anchor, reserve=reserve)

    def run(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: SkipCache,
        options: ForwardOptions = DEFAULTS,
    ) -> Tensor:
        if not isinstance(cache, PagedCache):
            return super().run(h, layout, cache, options)
        self._check(cache, options.wants_gradient)
        self.check_places(layout.positions, layout.first_column + layout.width)
        cache.grow(layout, self.anchor)
        run_stage = partial(self._run_stage, cache)
        if self.plan.removals:
            record = None if self.record is None else self.record.forwards.append
            staged = StagedForward(self.plan, run_stage, self._blocks, self.positions)
            return staged.run(h, layout, cache, options, record)
        ran = run_stage(h, layout, options, 0)
        cache.commit(ran.layout, _columns_of(ran.held, ran.layout))
        if self.record is not None and ran.routes is not None:
            self.record.forwards.append(decisions_of(ran.routes, ran.layout))
        return ran.out

    def _run_stage(
        self,
        cache: PagedCache,
        h: Tensor,
        layout: TokenLayout,
        options: ForwardOptions,
        stage: int,
    ) -> Ran:
        """See ``staged_forward.RunStage``."""
        captured = self._captured(h, layout, cache, options, stage)
        if captured is None:
            return self._launch_stage(cache, h, layout, options, stage)
        forward, numbers = captured
        out, entered = forward.run(h, numbers, cache), forward.entered
        entered = None if entered is None else numbers.layout.real(entered)
        return Ran(out, numbers.layout, forward.held, forward.routes, entered)

    def _launch_stage(
        self,
        cache: PagedCache,
        h: Tensor,
        layout: TokenLayout,
        options: ForwardOptions,
        stage: int,
    ) -> Ran:
        """Runs a stage without a graph."""
        numbers = self._numbers(layout, cache, options, stage)
        packed = h if stage else self.positions.embed(layout.pack(h), layout.positions)
        seen: list[Tensor] = []

        def note(layer: int, rows: Tensor) -> None:
            if layer == self.plan.removal_layer(stage):
                seen.append(rows.clone())

        send = sender(numbers, cache.anchor.device)
        rows = ForwardRows(
            self.plan, numbers, send, cache.device_counts, self.routers, cache.anchor
        )
        rotation = self.positions.rotation(layout.positions_needed, packed, layout.axes)
        store, steps = Store(rotation, cache.pages_of), self.plan.stages[stage]
        placed = numbers.features
        if placed is not None:
            placed = replace(placed, rows=send(RowNumbers.featured))
        with span("decoder"):
            out = run_steps(
                self.plan,
                self._fused_blocks,
                packed,
                rows.of,
                store,
                options.watch,
                steps,
                features=placed,
                note=note,
            ).h
        out = out if numbers.read is None else numbers.read.take(out)
        return Ran(out, layout, rows.held, rows.routes, seen[0] if seen else None)

    def _numbers(
        self, layout: TokenLayout, cache: PagedCache, options: ForwardOptions, stage: int
    ) -> RowNumbers:
        # The last-layer rule applies to the last stage only.
        wanted = options.wanted if stage == len(self.plan.removals) else None
        rows = None if wanted is None else layout.locate(wanted)
        cached, features = cache.seen.codes_at(stage), options.features
        if narrows_after(self.plan):
            return RowNumbers(layout, cached, read=rows, features=features)
        return RowNumbers(layout, cached, narrow=rows, features=features)

    def _captured(
        self,
        h: Tensor,
        layout: TokenLayout,
        cache: PagedCache,
        options: ForwardOptions,
        stage: int,
    ) -> tuple[CapturedForward, RowNumbers] | None:
        """A graph for this forward and the numbers to run it with; ``None``: run without one."""
        is_plain = self.ops.implementation is Implementation.TRITON and self.flash is None
        is_plain = is_plain and options.watch is None and not ranges_enabled()
        if not is_plain or not 0 < len(layout) <= MOST_ROWS:
            return None
        layout = layout.filled(rounded_rows)
        numbers = self._numbers(layout, cache, options, stage)
        shape = ForwardShape.of(numbers, cache, self.plan.shape.max_positions, stage)
        graphs = self.captured
        graphs.renew((self.version, self.addresses(), graphs.switches))
        forward = graphs.get(shape)
        if forward is None:
            if not graphs.pays(shape):
                return None
            blocks = graphs.blocks(self._fused_blocks, self.plan, h.device)
            layers = Layers(self.plan, blocks, self.positions, self.routers)
            build = partial(CapturedForward, layers, shape, h, numbers, cache)
            forward = graphs.make_if_room(shape, h.device, build)
        return None if forward is None else (forward, numbers)

    def _check(self, cache: PagedCache, wants_gradient: bool) -> None:
        if wants_gradient:
            raise ValueError(
                "past_key_values: this cache was filled without gradients; allowed: no cache "
                "(use_cache=False) if gradients are wanted, else torch.no_grad() around the forward"
            )
        if not self.is_fused:
            raise RuntimeError(
                "past_key_values: this cache was filled while the layers' projections were merged, "
                "which is no longer possible (hooks, adapters or replaced weights); start again "
                "from the whole prompt"
            )
        if cache.anchor is not self.anchor:
            raise ValueError(
                "past_key_values: this cache was filled by another model, or before this one was "
                "moved to another device or dtype; start again from the whole prompt"
            )


def _addresses_of(blocks: Sequence[FusedBlock]) -> tuple[int, ...]:
    parts: list[Norm | Linear] = []
    for own in (block.weights for block in blocks):
        parts += own.attention_norm, own.qkv, own.output, own.ffn_norm, own.feed, own.down
        if own.head_norms is not None:
            parts += own.head_norms.queries, own.head_norms.keys
    tensors = [tensor for part in parts for tensor in (part.weight, part.bias)]
    return tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)


def _columns_of(held: Mapping[int, Tensor], layout: TokenLayout) -> dict[Table, Tensor]:
    """From flags of rows ``[N]``, by layer, to flags of columns ``[B, T]``, in few launches."""
    if not held:
        return {}
    columns = layout.unpack(torch.stack(list(held.values()), dim=1).bool())
    return dict(zip(held, columns.unbind(-1), strict=True))


def _is_cast(like: Tensor) -> bool:
    """Whether autocast computes in a dtype other than the weights'."""
    kind = like.device.type
    is_on = torch.is_autocast_enabled(kind)
    return is_on and torch.get_autocast_dtype(kind) != like.dtype
