"""The decoder layers of one model on their own, to time steps under any policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cells import Setting
from benchmarks.gpu.inputs import Maker, Widths
from benchmarks.gpu.nodes import replay_seconds
from fastskip.decoder.fused.conditional_layer import IfBlock
from fastskip.decoder.fused.forward_rows import ForwardRows
from fastskip.decoder.fused.guarded_layer import GuardedBlock
from fastskip.decoder.fused.hopping import Hopping
from fastskip.decoder.fused.layer import FusedBlock
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.parts import Store
from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.fused.rows import sender
from fastskip.decoder.fused.step_state import StepShape, StepState
from fastskip.decoder.fused.steps import run_steps
from fastskip.decoder.weights import LayerWeights
from fastskip.generation.guarding import Guarding
from fastskip.kernels import tuning
from fastskip.kernels.tuning import Entry, Table
from fastskip.ops.bodies import bodies_on
from fastskip.ops.contracts import Activation
from fastskip.ops.graphs import capture
from fastskip.ops.overlap import Overlap, overlapping
from fastskip.plan import SkipPlan, make_plan
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.routing import build_routers
from fastskip.tokens import CODES, TokenLayout

Step = Callable[[], object]


class Stack:
    """Layers with separate weights, so that none are read from the L2 cache."""

    def __init__(self, setting: Setting, widths: Widths, depth: int) -> None:
        self._setting, self._widths = setting, widths
        self._make = Maker(widths, setting.dtype, setting.device)
        self._shape = widths.model_shape(setting.dtype, depth)
        self._weights = [self._layer() for _ in range(depth)]
        self._anchor = torch.zeros(16, dtype=setting.dtype, device=setting.device)

    def step(
        self,
        policy: SkipPolicy,
        guarding: Guarding = Guarding.EARLY_EXIT,
        turns: int = 1,
        overlap: Overlap = Overlap.NONE,
    ) -> Step:
        """One decode step after a prompt, at batch 1, under a policy.

        Args:
            turns: layers per turn of a loop.
            overlap: how the launches of a loop overlap.

        Raises:
            ValueError: steps of this policy cannot run as a loop.
        """
        plan, shape, widths = make_plan(policy, self._shape), self._shape, self._widths
        routers = build_routers(policy, shape.depth, shape.hidden_size)
        scale = shape.head_dim**-0.5
        own: Sequence[FusedBlock] = [
            GuardedBlock(weights, layer, self._setting.ops, scale, shape.head_dim)
            for weights, layer in zip(self._weights, plan.layers, strict=True)
        ]
        rotation, device = self._make.rotation(), self._setting.device
        cache = self._cache(plan, own, routers)
        step = StepShape(batch=1, slots=2 * widths.context, stops=0, pad=0)
        state = StepState(plan, self._anchor, rotation, step, routers)
        cache.make_room_for_steps(0, 1)
        state.load(cache, torch.zeros(1, dtype=torch.int64, device=device), ())
        if guarding is Guarding.CONDITIONAL:
            bodies = bodies_on(device)
            own = [IfBlock.of(block, bodies) for block in own]
        if guarding is Guarding.HOPS:
            hopping = Hopping.of(own, state, bodies_on(device), turns)
            if hopping is None:
                raise ValueError("policy: its steps cannot run as a loop")

            def run() -> None:
                with overlapping(overlap):
                    hopping.run(plan, own, state.h, state)

            return run
        # State and rows keep the cache's memory alive.
        return lambda: run_steps(plan, own, state.h, state.rows_of, state.store)

    def _cache(self, plan: SkipPlan, own: Sequence[FusedBlock], routers: Any) -> PagedCache:
        """The cache of a prompt."""
        context = self._widths.context
        codes = torch.full((1, context), CODES[TokenClass.TEXT])
        codes[:, : self._widths.n_image] = CODES[TokenClass.IMAGE]
        layout = TokenLayout(codes, torch.arange(context)[None], 0, plan.groups)
        cache = PagedCache(plan, self._anchor)
        h = self._make.noise(len(layout), self._widths.hidden)
        cache.grow(layout, h)
        numbers = RowNumbers(layout, cache.seen.codes)
        send, counts = sender(numbers, self._anchor.device), cache.device_counts
        rows = ForwardRows(plan, numbers, send, counts, routers, self._anchor)
        store = Store(self._make.rotation(), cache.pages_of)
        run_steps(plan, own, h, rows.of, store)
        cache.commit(layout, {key: layout.unpack(one.bool()) for key, one in rows.held.items()})
        return cache

    def _layer(self) -> LayerWeights:
        make, size = self._make, self._widths
        queries = size.heads * size.head_dim
        qkv = make.linear(queries + 2 * size.groups * size.head_dim, size.hidden)
        return LayerWeights(
            attention_norm=make.norm(),
            qkv=qkv,
            queries=qkv.rows(0, queries),
            keys_values=qkv.rows(queries),
            output=make.linear(size.hidden, queries),
            ffn_norm=make.norm(),
            feed=make.linear(2 * size.ffn, size.hidden),
            activation=Activation.GATED_SILU,
            down=make.linear(size.hidden, size.ffn),
        )


def microseconds(setting: Setting, step: Step, depth: int) -> float:
    """Microseconds per block of a captured step; the cost of a graph launch cancels out."""
    with torch.no_grad():
        step()
        if setting.device.type != "cuda":
            return 0.0
        times = [
            replay_seconds(capture(partial(_repeat, step, passes), setting.device))
            for passes in (1, 3)
        ]
    return 1e6 * (times[1] - times[0]) / (2 * depth)


def _repeat(step: Step, passes: int) -> None:
    for _ in range(passes):
        step()


@contextmanager
def programs_at_most(programs: int | None, device: torch.device) -> Iterator[None]:
    """Within this block guarded launches have at most this many programs; ``None``: as in
    tables."""
    if programs is None:
        yield
        return
    name, arch = None, None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, arch = torch.cuda.get_device_name(device), 10 * major + minor
    own = {"guarded": [Entry(None, None, {"PROGRAMS": programs})]}
    with tuning.table(Table("programs", name or "", arch, None, own)):
        yield
