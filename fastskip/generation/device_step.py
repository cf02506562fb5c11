"""The decode step of the device executor: one graph replay per token, without a host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastskip.decoder.anatomy import NORM_NUMBERS, has_hooks, is_plain, norm_of
from fastskip.decoder.fused.conditional_layer import IfBlock
from fastskip.decoder.fused.hopping import Hopping
from fastskip.decoder.fused.kept_graphs import Graphs
from fastskip.decoder.fused.layer import FusedBlock
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.parts import Stream
from fastskip.decoder.fused.sizes import power_of_two
from fastskip.decoder.fused.stack import FusedDecoder
from fastskip.decoder.fused.step_state import StepShape, StepState
from fastskip.decoder.fused.steps import run_steps
from fastskip.families import final_norm_of, logits_scaling, scaled, text_model_of
from fastskip.generation.guarding import MOST_ROWS, Guarding
from fastskip.ops import Implementation
from fastskip.ops.allocate import on_host
from fastskip.ops.bodies import Bodies
from fastskip.ops.contracts import Linear, Norm, Rotation
from fastskip.ops.graphs import capture
from fastskip.ops.overlap import Overlap, can_overlap, overlapping
from fastskip.ops.ranges import ranges_enabled, span

# Graphs kept; each holds the activations of one step.
KEPT = 8
# Slots of the smallest step, which serves every call of up to this many columns.
SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Manner:
    """How a step's kernels are launched.

    Attributes:
        guarding: how the step bypasses what routers let every row skip; all but early exits need
            ``Bodies``.
        overlap: how launches overlap; with conditional nodes none do.
        halves: whether a residual update also computes half of the norm that follows, which the
            next GEMM then need not compute itself.
    """

    guarding: Guarding
    overlap: Overlap
    halves: bool


class DeviceStep:
    """Embeds one token per sequence, runs the decoder, applies the head; may pick the token.

    Everything lies at fixed addresses, so on CUDA the step is one graph.
    """

    def __init__(
        self,
        model: Any,
        decoder: FusedDecoder,
        shape: StepShape,
        rotation: Rotation | None,
        pool: Any,
        *,
        chooses: bool,
        manner: Manner,
        bodies: Bodies | None,
    ) -> None:
        """``chooses``: the device picks the greedy token; else the step leaves logits to read."""
        self._decoder, self._chooses, self._halves = decoder, chooses, manner.halves
        self._blocks: Sequence[FusedBlock] = decoder.blocks
        guarding = manner.guarding
        if guarding is Guarding.CONDITIONAL and bodies is not None:
            self._blocks = [IfBlock.of(block, bodies) for block in decoder.blocks]
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._norm = final_norm_of(text_model_of(model))
        self._scaling = logits_scaling(model.config)
        anchor = decoder.anchor
        self.state = StepState(decoder.plan, anchor, rotation, shape, decoder.routers)
        self._hopping: Hopping | None = None
        if guarding is Guarding.HOPS and bodies is not None:
            self._hopping = Hopping.of(self._blocks, self.state, bodies)
        has_nodes = self._blocks is not decoder.blocks or self._hopping is not None
        self._overlap = Overlap.NONE if has_nodes else manner.overlap
        self.logits: Tensor | None = None
        # A graph would replay what hooks and adapters did at capture, not what they do now.
        # The torch implementation reads counts on the host.
        is_plain = (
            all(map(_is_known, _modules_of(model)))
            and decoder.positions.is_plain
            and decoder.ops.implementation is Implementation.TRITON
        )
        self._replay: Callable[[], None] | None = None
        if is_plain:
            self._replay = capture(self._step, anchor.device, pool)

    def run(self) -> None:
        """Advances by one token; returns before the device is done."""
        if not ranges_enabled():
            (self._replay or self._step)()
            return
        before = self.logits
        with span("decode step"):  # graph nodes carry no names
            self._step()
        if before is not None and self.logits is not None:
            self.logits = before.copy_(self.logits)  # the memory that replays write

    def _step(self) -> None:
        with overlapping(self._overlap):
            self._launch()

    def _launch(self) -> None:
        state, ops = self.state, self._decoder.fused
        self._embed()
        plan, blocks, norm = self._decoder.plan, self._blocks, _norm_of(self._norm)
        has_head = norm is not None and is_plain(self._head, nn.Linear)
        if self._hopping is not None:
            stream = Stream(self._hopping.run(plan, blocks, state.h, state))
        else:
            reader = norm if self._halves and has_head else None
            stream = run_steps(plan, blocks, state.h, state.rows_of, state.store, reader=reader)
        h, half = stream.h, stream.half_of(norm)
        if not has_head:
            self.logits = scaled(self._head(self._norm(h)), self._scaling)
            if self._chooses:
                ops.choose(self.logits, state.choice)
        else:
            head = Linear(self._head.weight, self._head.bias)
            if self._chooses:
                # Which is the largest does not depend on the scaling.
                ops.head_choose(h, norm, head, state.choice, half=half)
            else:
                self.logits = scaled(ops.head_logits(h, norm, head, half=half), self._scaling)
        if not self._chooses:
            ops.advance(state.choice)

    def _embed(self) -> None:
        """Embeds the tokens to feed into the residual stream."""
        h, choice, positions = self.state.h, self.state.choice, self._decoder.positions
        if is_plain(self._embedding, nn.Embedding) and positions.is_plain:
            table, places = self._embedding.weight.detach(), positions.table
            self._decoder.fused.embed(
                choice.tokens, table, h, positions=choice.positions, places=places
            )
            if positions.scale != 1.0:
                h.mul_(positions.scale)
        else:
            h.copy_(positions.embed(self._embedding(choice.tokens), choice.positions))


@dataclass(frozen=True, slots=True)
class StepRequest:
    """The step that a call wants.

    Batch and columns are rounded up, so that a few steps serve all calls.

    Attributes:
        cache: its batch is the step's.
        columns: how many there will be in all.
        stops: how many tokens end a sequence.
        pad: what a finished sequence yields.
        chooses: the device picks the greedy token.
    """

    model: Any
    decoder: FusedDecoder
    cache: PagedCache
    columns: int
    chooses: bool
    stops: int = 0
    pad: int = 0


class _StepKey(NamedTuple):
    """What a step has baked in, besides the model; ``depth``: of the call, among nested ones."""

    shape: StepShape
    positions: int
    chooses: bool
    manner: Manner
    depth: int


class DeviceSteps:
    """The steps of one model that are ready to run; the least recently used is evicted first.

    ``guarding``, ``overlap`` and ``halves``, as in ``Manner``, may be set at any time; the first
    two apply where model and device allow them.
    """

    def __init__(self) -> None:
        self.guarding = Guarding.EARLY_EXIT
        self.overlap = Overlap.START
        self.halves = False
        self._steps: Graphs[_StepKey, DeviceStep] = Graphs(KEPT)
        self._depth = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within this block steps belong to one ``generate``; at its end they release the cache.

        A nested call (from a streamer, say) gets its own steps.
        """
        self._depth += 1
        try:
            yield
        finally:
            with on_host():
                for key, step in self._steps.items():
                    if key.depth == self._depth and step.state.is_loaded:
                        step.state.unload()
            self._depth -= 1

    def find(self, asked: StepRequest) -> DeviceStep | None:
        """The step that was asked for, if it was made before."""
        return self._steps.get(self._key(asked))

    def take(self, asked: StepRequest) -> DeviceStep:
        """The step that was asked for; makes it if it is missing."""
        key, decoder = self._key(asked), asked.decoder
        found = self._steps.get(key)
        if found is not None:
            return found
        return self._steps.make(
            key,
            decoder.anchor.device,
            lambda pool: DeviceStep(
                asked.model,
                decoder,
                key.shape,
                decoder.positions.rotation(key.positions, decoder.anchor),
                pool,
                chooses=key.chooses,
                manner=key.manner,
                bodies=self._bodies_for(decoder, key.shape),
            ),
        )

    def _key(self, asked: StepRequest) -> _StepKey:
        """What the step has baked in; drops all steps if the model has changed since."""
        model, decoder, seen = asked.model, asked.decoder, asked.cache.seen
        # Everything that a graph bakes in.
        around = [(id(m), _is_known(m), *_facts_of(m)) for m in _modules_of(model)]
        version = (
            decoder.version,
            decoder.addresses(),
            decoder.positions.is_plain,
            logits_scaling(model.config),
            *around,
        )
        self._steps.renew(version)
        # Rounded up generously, since every size needs its own capture.
        slots = max(SLOTS, power_of_two(asked.columns))
        shape = StepShape(
            batch=bucket(seen.batch),
            slots=slots,
            stops=bucket(asked.stops) if asked.stops else 0,
            pad=asked.pad,
        )
        # Positions given by a caller may run ahead of columns.
        ahead = max(0, int(seen.next_places().max()) - asked.cache.columns)
        positions = power_of_two(max(slots + ahead, decoder.plan.shape.max_positions))
        has_bodies = self._bodies_for(decoder, shape) is not None
        manner = Manner(
            guarding=self.guarding if has_bodies else Guarding.EARLY_EXIT,
            overlap=self.overlap if can_overlap(decoder.anchor.device) else Overlap.NONE,
            halves=self.halves,
        )
        return _StepKey(shape, positions, asked.chooses, manner, self._depth)

    def _bodies_for(self, decoder: FusedDecoder, shape: StepShape) -> Bodies | None:
        is_wanted = self.guarding is not Guarding.EARLY_EXIT and bool(decoder.plan.routed)
        if not is_wanted or shape.batch > MOST_ROWS:
            return None
        return self._steps.bodies(decoder.anchor.device)

    def __getstate__(self) -> dict[str, Any]:
        settings = {"guarding": self.guarding, "overlap": self.overlap, "halves": self.halves}
        return {**type(self)().__dict__, **settings}


def bucket(count: int) -> int:
    """``count`` rounded up to a power of two; above 64, to a multiple of 64."""
    return power_of_two(count) if count <= 64 else -(-count // 64) * 64


def _modules_of(model: Any) -> tuple[Any, Any, Any]:
    """What a step runs besides the layers: embedding, final norm, head."""
    return (
        model.get_input_embeddings(),
        final_norm_of(text_model_of(model)),
        model.get_output_embeddings(),
    )


def _is_known(module: Any) -> bool:
    """Whether the module does nothing but a fused operation on its weights."""
    is_linear = is_plain(module, nn.Embedding) or is_plain(module, nn.Linear)
    return is_linear or _norm_of(module) is not None


def _norm_of(module: Any) -> Norm | None:
    """The final norm as the fused operations read it; ``None`` if it is anything else."""
    return None if has_hooks(module) else norm_of(module)


def _facts_of(module: Any) -> tuple[object, ...]:
    """The addresses of its weights, and a norm's epsilon."""
    bias = getattr(module, "bias", None)
    numbers = (getattr(module, name, None) for name in NORM_NUMBERS)
    return module.weight.data_ptr(), None if bias is None else bias.data_ptr(), *numbers
