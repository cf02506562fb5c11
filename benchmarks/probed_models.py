"""The sizes of real models, and operands of their operations on tensors that hold no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import SEVEN, THIRTEEN, Widths
from fastskip.kernels import feed, head, projection, residual, step_attention
from fastskip.ops.bitmaps import Packed, bitmap_bytes
from fastskip.ops.contracts import (
    ARRIVALS,
    PAGE,
    Activation,
    Bounds,
    Choice,
    Feed,
    HalfNorm,
    HeadNorms,
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
from fastskip.ops.hops import Field, HopLayer, Hops
from fastskip.ops.routes import Chosen, Group, Move, Route, Score, Terms, Trace, Verdict

CONTEXT = 1024
"""Cache entries of a sequence."""
STEPS, SETS = 128, 2
LAYERS = 24


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return blank(*shape, dtype=dtype)


def chosen(n: int) -> Chosen:
    return Chosen(numbers(n))


def routed(
    model: Model, n: int, score: Score, move: Move = Move.NONE, group: Group = Group.ROW
) -> Route:
    """One decision on ``n`` rows."""
    weight = blank(model.hidden, dtype=torch.float32) if score is Score.LINEAR else None
    verdict = Verdict(
        score=score, bar=0.5, weight=weight, group=group, runs=numbers(n), candidates=numbers(n)
    )
    trace = Trace(model.h(n), blank(n, 2, dtype=torch.float32))
    ran = [numbers(n)] if move is Move.NEXT else []
    return Route([verdict], numbers(n), numbers(n), trace, move, ran, numbers(1))


def within(route: Route, capacity: float) -> Route:
    """The same decisions, but for a share of each sequence instead of against a threshold."""
    found = [replace(verdict, capacity=capacity) for verdict in route.verdicts]
    return replace(route, verdicts=found)


@dataclass(frozen=True)
class Model(Widths):
    """Sizes of a decoder, and the operands of its operations."""

    is_opt: bool = False
    like: str | None = None
    """A model whose kernels differ from this one's only in numbers of rows and columns."""

    @property
    def norm(self) -> Norm:
        if self.is_opt:
            return Norm(blank(self.hidden), 1e-5, blank(self.hidden), is_centred=True)
        return Norm(blank(self.hidden), 1e-5)

    @property
    def activation(self) -> Activation:
        return Activation.RELU if self.is_opt else Activation.GATED_SILU

    def linear(self, rows: int, columns: int) -> Linear:
        return Linear(blank(rows, columns), blank(rows) if self.is_opt else None)

    def h(self, n: int) -> Tensor:
        return blank(n, self.hidden)

    def places(self) -> Tensor | None:
        """The learned position embeddings, which start at row 2 of their table."""
        return blank(2 + 2048, self.hidden)[2:] if self.is_opt else None

    def pages(self, sequences: int) -> Pages:
        table = numbers(sequences, CONTEXT // PAGE, dtype=torch.int64)
        return Pages(blank(16), table, 0, self.groups, self.head_dim, [])

    def project(self, n: int, *, has_norms: bool = False) -> Projection:
        rows = (self.heads + 2 * self.groups) * self.head_dim
        half = self.head_dim // 2
        rotation = None if self.is_opt else Rotation(blank(4096, half), blank(4096, half))
        targets = Targets(numbers(n), numbers(n), numbers(n))
        linear = self.linear(rows, self.hidden)
        norm = Norm(blank(self.head_dim), 1e-6)
        return Projection(
            self.norm,
            linear,
            rotation,
            targets,
            self.pages(n),
            self.head_dim,
            head_norms=HeadNorms(norm, norm) if has_norms and rotation is not None else None,
        )

    def up(self) -> Feed:
        rows = self.ffn if self.is_opt else 2 * self.ffn
        return Feed(self.norm, self.linear(rows, self.hidden), self.activation)

    def entries(self, n: int) -> Tensor:
        return blank(n, self.heads + 2 * self.groups, self.head_dim)

    def queries(self, n: int) -> Tensor:
        return blank(n, self.heads, self.head_dim)

    def output(self, n: int) -> Term:
        size = self.heads * self.head_dim
        return Term(blank(n, size), self.linear(self.hidden, size))

    def half(self, n: int, norm: Norm) -> HalfNorm:
        """As an update in tiles of 16 columns leaves it."""
        return HalfNorm(norm, self.h(n), blank(n, self.hidden // 16, dtype=torch.float32))

    def halve(self, n: int, *, config: Mapping[str, int] | None = None) -> None:
        """An update that leaves a half norm, if the model's norm allows one."""
        if HalfNorm.is_of(self.norm, torch.bfloat16):
            arrivals = None if config is None else numbers(ARRIVALS)
            residual.add_terms_and_halve_(
                self.h(n), [self.down(n)], self.norm, arrivals=arrivals, config=config
            )

    def read_half(self, n: int, *, config: Mapping[str, int] | None = None) -> None:
        """The first products of both sublayers, reading the rows of a half norm."""
        if HalfNorm.is_of(self.norm, torch.bfloat16):
            arrivals = None if config is None else numbers(ARRIVALS)
            more: dict[str, Any] = {"arrivals": arrivals, "config": config}
            own, part = self.project(n), self.up()
            projection.project_append(self.h(n), [own], half=self.half(n, own.norm), **more)
            feed.feed(self.h(n), [part], half=self.half(n, part.norm), **more)

    def choose_by_half(self, n: int) -> None:
        if HalfNorm.is_of(self.norm, torch.bfloat16):
            norm, own = self.norm, self.lm_head()
            head.head_choose(self.h(n), norm, own, self.choice(n), half=self.half(n, norm))

    def down(self, n: int) -> Term:
        return Term(blank(n, self.ffn), self.linear(self.hidden, self.ffn))

    def pruned_up(self) -> tuple[Packed, Tensor | None]:
        """The first product of the FFN with half of its weights, and its bias."""
        linear = self.up().linear
        rows, columns = linear.weight.shape
        bitmap = numbers(rows, bitmap_bytes(1, columns), dtype=torch.uint8)
        values = blank(rows * columns // 2)
        return Packed(bitmap, values, numbers(rows + 1), columns), linear.bias

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def lm_head(self) -> Linear:
        return Linear(blank(self.vocabulary, self.hidden))

    def step_reach(self, n: int) -> StepReach:
        return StepReach(numbers(n), 1, n * CONTEXT, numbers(n * self.heads))

    def reach(self, n: int) -> Reach:
        return Reach(numbers(n), numbers(n), Bounds((0, n), numbers(2)))

    def loop(self, n: int, score: Score, group: Group = Group.ROW) -> Hops:
        """A loop over layers that decide alike, as many as the smallest model has."""
        weight = blank(self.hidden, dtype=torch.float32) if score is Score.LINEAR else None
        terms = Terms(score=score, bar=0.5, weight=weight, group=group)
        layer = HopLayer(
            projection=replace(self.project(n), leaves_all=False),
            reach=self.step_reach(n),
            output=self.output(n).linear,
            feed=self.up(),
            down=self.down(n).linear,
            terms=terms,
            home=numbers(n),
        )
        looks_back = score in (Score.COSINE, Score.CHANGE)
        return Hops.over(
            [layer] * LAYERS,
            live=numbers(n),
            positions=numbers(n),
            sequences=numbers(n),
            trace=Trace(self.h(n), blank(n, 2, dtype=torch.float32)) if looks_back else None,
            arrivals=numbers(1),
            scale=self.scale,
        )

    def run_in_loop(self, n: int) -> None:
        """A layer of a loop, up to its last update."""
        loop = self.loop(n, Score.RANDOM)
        own, now = loop.layers[0], loop.now
        reach = replace(own.reach, runs=loop.runs)
        projection.project_append(self.h(n), [own.projection], chosen=chosen(n), now=now)
        step_attention.attend_step([self.queries(n)], [reach], [own.pages], self.scale, now=now)
        term = Term(self.output(n).x, own.output)
        residual.add_terms_(self.h(n), [term], chosen=[chosen(n)], loop=loop, field=Field.OUTPUT)
        feed.feed(self.h(n), [own.feed], chosen=chosen(n), now=now)

    def end_in_loop(self, n: int, score: Score, group: Group = Group.ROW) -> None:
        """The last update of a layer of a loop, which selects the next layer to run."""
        loop, term = self.loop(n, score, group), self.down(n)
        residual.add_terms_(self.h(n), [term], chosen=[chosen(n)], loop=loop, field=Field.DOWN)

    def choice(self, n: int) -> Choice:
        wide = torch.int64
        return Choice(
            tokens=numbers(n, dtype=wide),
            history=numbers(STEPS, n, dtype=wide),
            step=numbers(1),
            unfinished=numbers(n),
            stops=numbers(1, dtype=wide),
            pad=0,
            counts=numbers(SETS, n),
            grows=numbers(SETS, n),
            positions=numbers(n),
        )


LLAMA_7B = Model(**vars(SEVEN))
LLAMA_13B = Model(**vars(THIRTEEN), like=LLAMA_7B.name)
QWEN_HALF = Model("0.5b", 896, 14, 2, 64, 4864, 151936, 24)
OPT = Model("opt-2.7b", 2560, 32, 32, 80, 10240, 50272, 32, is_opt=True)
MODELS = (LLAMA_7B, LLAMA_13B, QWEN_HALF, OPT)
