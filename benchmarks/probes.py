"""Calls every kernel's launcher at the shapes of real models, on tensors that hold no data.

Within ``launch.recording(is_dry=True)`` the calls record what would be launched. Each entry of
``PROBES`` names the tuning tables that determine the row counts it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product

import torch

from benchmarks.probed_models import LLAMA_7B, MODELS, Model, blank, chosen, numbers, routed, within
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
from fastskip.ops.contracts import ARRIVALS, Bounds
from fastskip.ops.routes import Chosen, Group, Move, Score, Switch

MANY = 640
"""Rows for a bucket without an upper bound: a prompt of one image."""
STEP_ROWS = (1, 16)
LONG = {"BLOCK_M": 8, "BLOCK_N": 1, "BLOCK_E": 256, "STAGES": 4, "LONG": 264, "num_warps": 4}
"""One of the configurations with few programs that each loop over many tiles."""
CONFIGURED = ("BLOCK", "STAGES", "SPLITS", "FUSED")
"""Prefixes of the names of block sizes."""


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
            for model, rows in product(probe.models(slug), probe.rows(slugs)):
                for launch in _launches(probe, model, rows):
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
        for probe, rows in product(PROBES, STEP_ROWS):
            if probe.most is not None and rows > probe.most:
                continue
            for launch in _launches(probe, LLAMA_7B, rows):
                if constant in launch.arguments:
                    yield Probed(f"{probe.name}, {label}", LLAMA_7B.name, rows, launch)


def _launches(probe: Probe, model: Model, rows: int) -> list[Launch]:
    """What one call would launch."""
    with recording(is_dry=True) as account:
        probe.call(model, rows)
    return account.launches


def configuration(launch: Launch) -> dict[str, int]:
    """Block sizes and compiler options of a launch."""
    names = [name for name in launch.arguments if name.startswith(CONFIGURED)]
    return {name: launch.arguments[name] for name in names} | dict(launch.options)
