"""Calls every kernel's launcher at the shapes of real models, on tensors that hold no data.

Within ``launch.recording(is_dry=True)`` the calls record what would be launched. Each entry of
``PROBES`` names the tuning tables that determine the row counts it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastskip.kernels import (
    activation,
    addition,
    compaction,
    copies,
    feed,
    head,
    hops,
    norm,
    overlap,
    parallel,
    projection,
    residual,
    rotary,
    routing,
    row_attention,
    row_gemm,
    sampler,
    sparse,
    step_attention,
    tuning,
)
from fastskip.kernels.launch import Launch, recording
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
from fastskip.ops.routes import Chosen, Group, Move, Route, Score, Switch, Terms, Trace, Verdict

MANY = 640
"""Rows for a bucket without an upper bound: a prompt of one image."""
CONTEXT = 1024
"""Cache entries of a sequence."""
STEPS, SETS = 128, 2
LAYERS = 24
STEP_ROWS = (1, 16)
LONG = {"BLOCK_M": 8, "BLOCK_N": 1, "BLOCK_E": 256, "STAGES": 4, "LONG": 264, "num_warps": 4}
"""One of the configurations with few programs that each loop over many tiles."""
CONFIGURED = ("BLOCK", "STAGES", "SPLITS", "FUSED")
"""Prefixes of the names of block sizes."""


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
class Model:
    """Sizes of a decoder, and the operands of its operations."""

    name: str
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
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


LLAMA_7B = Model("7b", 4096, 32, 32, 128, 11008, 32064)
LLAMA_13B = replace(LLAMA_7B, name="13b", like="7b", hidden=5120, heads=40, groups=40, ffn=13824)
QWEN_HALF = Model("0.5b", 896, 14, 2, 64, 4864, 151936)
OPT = Model("opt-2.7b", 2560, 32, 32, 80, 10240, 50272, is_opt=True)
MODELS = (LLAMA_7B, LLAMA_13B, QWEN_HALF, OPT)


@dataclass(frozen=True)
class Probe:
    """One call, made once for each row bucket of the kernels in ``tables``.

    ``most``: the largest row count of a call. ``also``: further row counts.
    """

    name: str
    tables: tuple[str, ...]
    call: Callable[[Model, int], object]
    most: int | None = None
    also: tuple[int, ...] = ()

    def rows(self, slugs: tuple[str, ...]) -> list[int]:
        """The largest number of rows of every bucket of these tables."""
        entries = chain.from_iterable(
            tuning.read_table(slug).entries.get(kernel, ())
            for slug in slugs
            for kernel in self.tables
        )
        bounds = {entry.rows for entry in entries}
        beyond = max(MANY, *(2 * bound for bound in bounds if bound is not None), 0)
        rows = {beyond if bound is None else bound for bound in bounds} | set(self.also)
        return sorted({min(count, self.most or count) for count in rows})

    def models(self, slug: str) -> tuple[Model, ...]:
        """All models; for the default table only if an entry is specific to a shape, else only
        7B."""
        entries = tuning.read_table(slug).entries
        shapes = [entry.shape for kernel in self.tables for entry in entries.get(kernel, ())]
        return MODELS if slug != tuning.DEFAULT or any(shapes) else (LLAMA_7B,)


# No table contains shared tiles until a GPU has timed them.
SHARED_TERMS = {
    **{"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_E": 128, "STAGES": 3, "num_warps": 4},
    "SPLITS": 4,
}
SHARED_ROWS = {
    **{"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_E": 64, "GROUP": 8, "STAGES": 3, "num_warps": 8},
    "SPLITS": 4,
}

PROBES = (
    Probe("normalize", ("normalize",), lambda m, n: norm.normalize(m.h(n), m.norm)),
    Probe(
        "normalize of indexed rows with a change",
        ("normalize",),
        lambda m, n: norm.normalize(m.h(2 * n), m.norm, index=numbers(n), change=m.h(n)),
    ),
    Probe(
        "normalize of indexed rows, counted on the device",
        ("normalize",),
        lambda m, n: norm.normalize(m.h(n), m.norm, index=numbers(n), count=numbers(1)),
    ),
    Probe(
        "rotate_append",
        ("rotate_append",),
        lambda m, n: rotary.rotate_append(m.entries(n), m.project(n)),
    ),
    Probe(
        "rotate_append of chosen rows",
        ("rotate_append",),
        lambda m, n: rotary.rotate_append(m.entries(n), m.project(n), runs=numbers(n)),
    ),
    Probe(
        "rotate_append of compacted rows",
        ("rotate_append",),
        lambda m, n: rotary.rotate_append(
            m.entries(n),
            replace(m.project(n), leaves_all=False),
            chosen=Chosen(numbers(n), numbers(n), numbers(1), n),
        ),
    ),
    Probe(
        "rotate_append of heads with norms",
        ("rotate_append",),
        lambda m, n: rotary.rotate_append(m.entries(n), m.project(n, has_norms=True)),
    ),
    Probe(
        "activate",
        ("activate",),
        lambda m, n: activation.activate(blank(n, m.ffn if m.is_opt else 2 * m.ffn), m.activation),
    ),
    Probe(
        "add_rows",
        ("add_rows",),
        lambda m, n: addition.add_rows_(m.h(2 * n), m.h(n), index=numbers(n)),
    ),
    Probe(
        "add_rows, counted on the device",
        ("add_rows",),
        lambda m, n: addition.add_rows_(m.h(2 * n), m.h(n), index=numbers(n), count=numbers(1)),
    ),
    Probe(
        "copy_entries",
        ("copy_entries",),
        lambda m, n: copies.copy_entries(
            m.pages(4), m.pages(4), numbers(n), numbers(n), numbers(n)
        ),
    ),
    Probe(
        "copy_entries of rows without their own",
        ("copy_entries",),
        lambda m, n: copies.copy_entries(
            m.pages(4), m.pages(4), numbers(n), numbers(n), numbers(n), numbers(n)
        ),
    ),
    Probe(
        "read_entries",
        ("copy_entries",),
        lambda m, n: copies.read_entries(m.pages(4), numbers(n), numbers(n)),
    ),
    Probe(
        "attend_rows",
        ("attend_rows",),
        lambda m, n: row_attention.attend_rows(m.queries(n), m.reach(n), m.pages(1), m.scale),
    ),
    Probe(
        "attend_rows of chosen rows",
        ("attend_rows",),
        lambda m, n: row_attention.attend_rows(
            m.queries(n), replace(m.reach(n), runs=numbers(n)), m.pages(1), m.scale
        ),
    ),
    Probe(
        "attend_step",
        ("attend_step",),
        lambda m, n: step_attention.attend_step(
            [m.queries(n)], [m.step_reach(n)], [m.pages(n)], m.scale
        ),
        most=64,
        also=(1, 4, 16),
    ),
    Probe(
        "attend_step of a pair",
        ("attend_step",),
        lambda m, n: step_attention.attend_step(
            [m.queries(n)] * 2, [m.step_reach(n)] * 2, [m.pages(n)] * 2, m.scale
        ),
        most=64,
        also=(1, 16),
    ),
    Probe(
        "attend_step of chosen sequences",
        ("attend_step",),
        lambda m, n: step_attention.attend_step(
            [m.queries(n)],
            [replace(m.step_reach(n), runs=numbers(n))],
            [m.pages(n)],
            m.scale,
        ),
        most=64,
        also=(1, 4, 16),
    ),
    Probe("compact", ("compact",), lambda m, n: compaction.compact(numbers(n, dtype=torch.bool))),
    Probe(
        "compact for a SWITCH node",
        ("compact",),
        lambda m, n: compaction.compact(numbers(n), switch=Switch(16, 64)),
    ),
    Probe(
        "project_append",
        ("project_append",),
        lambda m, n: projection.project_append(m.h(n), [m.project(n)]),
        most=64,
    ),
    Probe(
        "project_append, long programs",
        ("project_append",),
        lambda m, n: projection.project_append(m.h(n), [m.project(n)], config=LONG),
        most=1,
    ),
    Probe(
        "project_append of a pair of indexed rows",
        ("project_append",),
        lambda m, n: projection.project_append(
            m.h(2 * n), [m.project(n), m.project(n)], index=numbers(n)
        ),
        most=64,
    ),
    Probe(
        "project_append of chosen rows",
        ("project_append", "guarded"),
        lambda m, n: projection.project_append(m.h(n), [m.project(n)], chosen=chosen(n)),
        most=64,
    ),
    Probe(
        "project_append of chosen rows, which alone leave entries",
        ("project_append", "guarded"),
        lambda m, n: projection.project_append(
            m.h(n), [replace(m.project(n), leaves_all=False)], chosen=chosen(n)
        ),
        most=16,
    ),
    Probe("feed", ("feed",), lambda m, n: feed.feed(m.h(n), [m.up()]), most=64),
    Probe(
        "feed, long programs",
        ("feed",),
        lambda m, n: feed.feed(m.h(n), [m.up()], config=LONG),
        most=1,
    ),
    Probe(
        "feed of a pair with changes",
        ("feed",),
        lambda m, n: feed.feed(m.h(n), [m.up(), m.up()], changes=[m.h(n), m.h(n)]),
        most=64,
    ),
    Probe(
        "feed of chosen rows",
        ("feed", "guarded"),
        lambda m, n: feed.feed(m.h(n), [m.up()], chosen=chosen(n)),
        most=64,
    ),
    Probe(
        "project_append_feed",
        ("project_append_feed",),
        lambda m, n: parallel.project_append_feed(m.h(n), m.project(n), m.up()),
        most=64,
    ),
    Probe(
        "project_append_feed of chosen rows",
        ("project_append_feed", "guarded"),
        lambda m, n: parallel.project_append_feed(
            m.h(n), m.project(n), m.up(), chosen=(chosen(n), chosen(n))
        ),
        most=64,
    ),
    Probe(
        "add_terms",
        ("add_terms",),
        lambda m, n: residual.add_terms_(m.h(n), [m.down(n)]),
        most=64,
    ),
    Probe(
        "add_terms of the attention",
        ("add_terms",),
        lambda m, n: residual.add_terms_(m.h(n), [m.output(n)]),
        most=64,
    ),
    Probe(
        "add_terms of both sublayers to indexed rows",
        ("add_terms",),
        lambda m, n: residual.add_terms_(m.h(n), [m.output(n), m.down(n)], index=numbers(n)),
        most=64,
    ),
    Probe(
        "add_terms of a pair",
        ("add_terms",),
        lambda m, n: residual.add_terms_(m.h(n), [m.down(n), m.down(n)], changes=[m.h(n), m.h(n)]),
    ),
    Probe(
        "add_terms whose tiles may be shared",
        ("add_terms_split",),
        lambda m, n: residual.add_terms_(m.h(n), [m.down(n)], arrivals=numbers(ARRIVALS)),
        most=64,
        also=(16,),
    ),
    Probe(
        "add_terms of shared tiles",
        ("add_terms_split",),
        lambda m, n: residual.add_terms_(
            m.h(n), [m.down(n)], arrivals=numbers(ARRIVALS), config=SHARED_TERMS
        ),
        most=64,
    ),
    Probe(
        "add_terms of both sublayers, of shared tiles",
        ("add_terms_split",),
        lambda m, n: residual.add_terms_(
            m.h(n),
            [m.output(n), m.down(n)],
            index=numbers(n),
            arrivals=numbers(ARRIVALS),
            config=SHARED_TERMS,
        ),
        most=64,
    ),
    Probe(
        "add_terms, and half of the norm that is next",
        ("add_terms",),
        lambda m, n: m.halve(n),
        most=64,
    ),
    Probe(
        "add_terms of shared tiles, and half of the norm that is next",
        ("add_terms_split",),
        lambda m, n: m.halve(n, config=SHARED_TERMS),
        most=64,
    ),
    Probe(
        "project_append and feed of a half norm",
        ("project_append", "project_append_half", "feed", "feed_half"),
        lambda m, n: m.read_half(n),
        most=64,
    ),
    Probe(
        "project_append and feed of a half norm, long programs",
        ("project_append", "feed"),
        lambda m, n: m.read_half(n, config=LONG),
        most=1,
    ),
    Probe(
        "project_append and feed of a half norm, of shared tiles",
        ("project_append_half", "feed_half"),
        lambda m, n: m.read_half(n, config=SHARED_TERMS),
        most=64,
    ),
    Probe(
        "head_choose of a half norm",
        ("head", "head_half", "finish"),
        lambda m, n: m.choose_by_half(n),
        most=64,
    ),
    Probe(
        "add_terms to chosen rows",
        ("add_terms", "guarded"),
        lambda m, n: residual.add_terms_(m.h(n), [m.down(n)], chosen=[chosen(n)]),
        most=64,
    ),
    Probe(
        "add_terms of both sublayers to chosen rows",
        ("add_terms", "guarded"),
        lambda m, n: residual.add_terms_(
            m.h(n), [m.output(n), m.down(n)], chosen=[chosen(n), chosen(n)]
        ),
        most=64,
    ),
    Probe(
        "apply_terms of a pair",
        ("apply_terms",),
        lambda m, n: residual.apply_terms([m.output(n), m.output(n)]),
        most=64,
    ),
    Probe(
        "linear_rows",
        ("linear_rows",),
        lambda m, n: row_gemm.linear_rows(m.h(n), m.output(n).linear),
    ),
    Probe(
        "linear_rows whose tiles may be shared",
        ("linear_rows_split",),
        lambda m, n: row_gemm.linear_rows(
            m.down(n).x, m.down(n).linear, arrivals=numbers(ARRIVALS)
        ),
        most=64,
    ),
    Probe(
        "linear_rows of shared tiles",
        ("linear_rows_split",),
        lambda m, n: row_gemm.linear_rows(
            m.down(n).x,
            m.down(n).linear,
            out=m.h(2 * n),
            out_index=numbers(n),
            onto=True,
            arrivals=numbers(ARRIVALS),
            config=SHARED_ROWS,
        ),
        most=64,
    ),
    Probe(
        "linear_rows of shared tiles, gated",
        ("linear_rows_split",),
        lambda m, n: row_gemm.linear_rows(
            m.h(n),
            m.up().linear,
            activation=m.activation,
            arrivals=numbers(ARRIVALS),
            config=SHARED_ROWS,
        ),
        most=64,
    ),
    Probe(
        "linear_rows gated, from indexed rows",
        ("linear_rows",),
        lambda m, n: row_gemm.linear_rows(
            m.h(2 * n), m.up().linear, index=numbers(n), activation=m.activation
        ),
    ),
    Probe(
        "linear_rows onto indexed rows, counted on the device",
        ("linear_rows",),
        lambda m, n: row_gemm.linear_rows(
            m.down(n).x,
            m.down(n).linear,
            out=m.h(2 * n),
            out_index=numbers(n),
            count=numbers(1),
            onto=True,
        ),
    ),
    Probe(
        "linear_rows of the heads of chosen rows, counted on the device",
        ("linear_rows",),
        lambda m, n: row_gemm.linear_rows(
            m.h(n),
            m.project(n).linear,
            out=m.entries(n).flatten(1),
            out_index=numbers(n),
            count=numbers(1),
        ),
    ),
    Probe(
        "head_logits",
        ("head",),
        lambda m, n: head.head_logits(m.h(n), m.norm, m.lm_head()),
        most=64,
    ),
    Probe(
        "head_choose, long programs",
        ("head",),
        lambda m, n: head.head_choose(m.h(n), m.norm, m.lm_head(), m.choice(n), config=LONG),
        most=1,
    ),
    Probe(
        "head_choose",
        ("head", "finish"),
        lambda m, n: head.head_choose(m.h(n), m.norm, m.lm_head(), m.choice(n)),
        most=64,
    ),
    Probe(
        "choose",
        ("maxima", "finish"),
        lambda m, n: sampler.choose(blank(n, m.vocabulary), m.choice(n)),
        most=64,
    ),
    Probe(
        "add_terms to chosen rows, with a decision on what similarity finds",
        ("add_terms", "guarded"),
        lambda m, n: residual.add_terms_(
            m.h(n),
            [m.down(n)],
            chosen=[chosen(n)],
            then=routed(m, n, Score.COSINE, Move.NEXT, Group.BATCH),
        ),
        most=64,
    ),
    Probe(
        "add_terms of both sublayers to chosen rows, with a decision by learned scores",
        ("add_terms", "guarded"),
        lambda m, n: residual.add_terms_(
            m.h(n),
            [m.output(n), m.down(n)],
            chosen=[chosen(n), chosen(n)],
            then=routed(m, n, Score.LINEAR, Move.START),
        ),
        most=64,
    ),
    Probe(
        "add_terms with a decision by learned scores",
        ("add_terms",),
        lambda m, n: residual.add_terms_(m.h(n), [m.down(n)], then=routed(m, n, Score.LINEAR)),
        most=64,
    ),
    Probe(
        "a layer of a loop",
        ("project_append", "feed", "add_terms", "attend_step", "guarded"),
        lambda m, n: m.run_in_loop(n),
        most=64,
        also=(1, 4, 16),
    ),
    Probe(
        "the end of a layer of a loop, decisions on what similarity finds",
        ("add_terms", "guarded"),
        lambda m, n: m.end_in_loop(n, Score.COSINE),
        most=64,
        also=(1, 16),
    ),
    Probe(
        "the end of a layer of a loop, decisions of sequences by learned scores",
        ("add_terms", "guarded"),
        lambda m, n: m.end_in_loop(n, Score.LINEAR, Group.SEQUENCE),
        most=64,
        also=(1, 16),
    ),
    Probe(
        "the first layer of a loop, by draw",
        (),
        lambda m, n: hops.begin_hops(m.h(n), m.loop(n, Score.RANDOM, Group.BATCH)),
        also=(1, 16),
    ),
    Probe(
        "the first layer of a loop, by learned scores",
        (),
        lambda m, n: hops.begin_hops(m.h(n), m.loop(n, Score.LINEAR)),
        also=(1, 16, 64),
    ),
    Probe(
        "route on what similarity finds",
        ("route",),
        lambda m, n: routing.route(m.h(n), routed(m, n, Score.COSINE, Move.NEXT)),
    ),
    Probe(
        "route of sequences by learned scores",
        ("route", "decide"),
        lambda m, n: routing.route(m.h(n), routed(m, n, Score.LINEAR, Move.START, Group.SEQUENCE)),
    ),
    Probe(
        "route within a capacity",
        ("route", "decide"),
        lambda m, n: routing.route(m.h(n), within(routed(m, n, Score.LINEAR), 0.5)),
    ),
    Probe(
        "place_entries",
        ("place_entries",),
        lambda m, n: routing.place_entries(
            numbers(n), numbers(n), Bounds((0, n), numbers(2)), numbers(1)
        ),
    ),
    Probe(
        "sparse_linear",
        ("sparse_linear",),
        lambda m, n: sparse.sparse_linear(m.h(n), *m.pruned_up()),
        most=8,
    ),
    Probe("advance", ("advance",), lambda m, n: sampler.advance(m.choice(n))),
    Probe(
        "embed",
        ("embed",),
        lambda m, n: sampler.embed(
            numbers(n, dtype=torch.int64),
            m.lm_head().weight,
            m.h(n),
            positions=numbers(n),
            places=m.places(),
        ),
    ),
)


@dataclass(frozen=True)
class Probed:
    """A launch, and the call that made it."""

    probe: str
    model: str
    rows: int
    launch: Launch


def record(slug: str) -> Iterator[Probed]:
    """The launches of every probe under the table ``slug``.

    Launches of a model that is ``like`` another are omitted where the configuration is the same.
    """
    slugs = tuple(dict.fromkeys((slug, tuning.DEFAULT)))
    with tuning.table(slug):
        for probe in PROBES:
            seen = set()
            for model in probe.models(slug):
                for rows in probe.rows(slugs):
                    with recording(is_dry=True) as account:
                        probe.call(model, rows)
                    for launch in account.launches:
                        code = launch.name, tuple(sorted(configuration(launch).items()))
                        if (model.like, code) not in seen:
                            yield Probed(probe.name, model.name, rows, launch)
                        seen.add((model.name, code))


def record_overlapping(slug: str) -> Iterator[Probed]:
    """Overlapping launches of a 7B decode step of 1 and of 16 rows, under the table ``slug``."""
    yield from _overlapping(slug, "OVERLAP", "overlapping")
    yield from _overlapping(slug, "READS_AHEAD", "reading ahead")


def _overlapping(slug: str, constant: str, label: str) -> Iterator[Probed]:
    """Launches of the kernels that have this constant, with it turned on."""
    reads_ahead = constant == "READS_AHEAD"
    with tuning.table(slug), overlap.overlapping(True, reads_ahead=reads_ahead):
        for probe in PROBES:
            for rows in STEP_ROWS:
                if probe.most is not None and rows > probe.most:
                    continue
                with recording(is_dry=True) as account:
                    probe.call(LLAMA_7B, rows)
                for launch in account.launches:
                    if constant in launch.arguments:
                        yield Probed(f"{probe.name}, {label}", LLAMA_7B.name, rows, launch)


def configuration(launch: Launch) -> dict[str, int]:
    """Block sizes and compiler options of a launch."""
    names = [name for name in launch.arguments if name.startswith(CONFIGURED)]
    return {name: launch.arguments[name] for name in names} | dict(launch.options)
