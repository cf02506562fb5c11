"""The fused operations as units of work: inputs, call, minimum bytes and FLOPs, a torch rival.

This module has those of a decode step, one row per sequence, and those shared with a prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cells import Setting
from benchmarks.gpu.compiling import compile_ahead
from benchmarks.gpu.inputs import Maker, Widths
from benchmarks.gpu.timing import copies
from fastskip.ops.contracts import (
    ARRIVALS,
    Feed,
    HalfNorm,
    Linear,
    Norm,
    Pages,
    Projection,
    Term,
)
from fastskip.ops.fused_entries import entries_of
from fastskip.plan.costs import Ceilings

Outcome = list[Tensor]


@dataclass(frozen=True)
class Work:
    """One call of one operation.

    Attributes:
        run: calls it on an implementation; returns the outputs to compare.
        nbytes: of weights and cache entries, read and written.
        flops: two per multiply-add.
        rival: the same products, or attention, in plain torch, for comparison.
        entries: returns the cache entries that it writes, to compare as well.
    """

    run: Callable[[Any], Outcome]
    nbytes: int
    flops: int = 0
    rival: Callable[[], object] | None = None
    entries: Callable[[], Outcome] = list

    def floor_seconds(self, ceilings: Ceilings) -> float:
        return max(self.nbytes / ceilings.bandwidth_bytes_per_s, self.flops / ceilings.flops_per_s)


WorkMaker = Callable[[Maker, int], Work]
"""Makes the work for a number of rows."""
HalfOf = Callable[[Tensor, Norm], HalfNorm | None]
"""The half norm that rows have before a work begins, if any."""


def on_own_memory(maker: WorkMaker, widths: Widths, rows: int, setting: Setting) -> list[Work]:
    """The same work several times, on copies of the weights that together exceed the L2 cache."""
    works = [maker(Maker(widths, setting.dtype, setting.device), rows)]
    for seed in range(1, copies(works[0].nbytes, setting.device)):
        works.append(maker(Maker(widths, setting.dtype, setting.device, seed), rows))
    return works


def compile_works(
    makers: Iterable[WorkMaker],
    widths: Widths,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compiles what these works launch."""
    if device.type == "cuda":
        from fastskip.ops import compiled

        works = (maker(Maker(widths, dtype, device), rows) for maker in makers)
        compile_ahead((partial(work.run, compiled) for work in works), device)


def whole(h: Tensor, norm: Norm) -> None:
    """No half norm: the work computes the whole norm."""


def project_append(make: Maker, rows: int, half_of: HalfOf = whole) -> Work:
    projection = projection_of(make, rows)
    h, arrivals = make.noise(rows, make.widths.hidden), make.integers([0] * ARRIVALS)
    half = half_of(h, projection.norm)
    return of_products(
        rows,
        [projection.linear],
        lambda ops: ops.project_append(h, [projection], half=half, arrivals=arrivals),
        rival=lambda: F.linear(h, projection.linear.weight),
        entries=lambda: written(projection),
    )


def attend_step(make: Maker, rows: int) -> Work:
    pages, reach = make.pages(rows), make.step_reach(rows)
    size = make.widths
    queries = make.noise(rows, size.heads, size.head_dim)
    scale = size.head_dim**-0.5
    pairs = rows * (size.context + 1)
    shape = (2, rows, size.groups, size.context + 1, size.head_dim)

    def rival() -> Callable[[], object]:
        keys, values = make.noise(*shape)
        return lambda: F.scaled_dot_product_attention(
            queries[:, :, None], keys, values, scale=scale, enable_gqa=size.heads != size.groups
        )

    return Work(
        lambda ops: ops.attend_step([queries], [reach], [pages], scale),
        2 * pairs * size.groups * size.head_dim * make.dtype.itemsize,
        4 * pairs * size.heads * size.head_dim,
        rival=lazy(rival),
    )


def add_output(make: Maker, rows: int) -> Work:
    return add(make, rows, [make.widths.heads * make.widths.head_dim])


def add_down(make: Maker, rows: int) -> Work:
    return add(make, rows, [make.widths.ffn])


def add_both(make: Maker, rows: int) -> Work:
    """Both second halves of a parallel block."""
    return add(make, rows, [make.widths.heads * make.widths.head_dim, make.widths.ffn])


def feed(make: Maker, rows: int, half_of: HalfOf = whole) -> Work:
    part, h = make.feed(), make.noise(rows, make.widths.hidden)
    half, arrivals = half_of(h, part.norm), make.integers([0] * ARRIVALS)
    return of_products(
        rows,
        [part.linear],
        lambda ops: ops.feed(h, [part], half=half, arrivals=arrivals),
        rival=lambda: F.linear(h, part.linear.weight),
    )


def project_feed(make: Maker, rows: int) -> Work:
    """Both first halves of a parallel block."""
    projection, part = projection_of(make, rows), make.feed()
    h = make.noise(rows, make.widths.hidden)
    return of_products(
        rows,
        [projection.linear, part.linear],
        lambda ops: list(ops.project_append_feed(h, projection, part)),
        rival=lambda: [F.linear(h, x.linear.weight) for x in (projection, part)],
        entries=lambda: written(projection),
    )


def pair_project(make: Maker, rows: int) -> Work:
    both = [projection_of(make, rows) for _ in range(2)]
    h = make.noise(rows, make.widths.hidden)
    return of_products(
        rows,
        [projection.linear for projection in both],
        lambda ops: ops.project_append(h, both),
        rival=lambda: [F.linear(h, projection.linear.weight) for projection in both],
        entries=lambda: [entry for projection in both for entry in written(projection)],
    )


def pair_apply(make: Maker, rows: int) -> Work:
    """The attention outputs of a pair."""
    width = make.widths.heads * make.widths.head_dim
    terms = [Term(make.noise(rows, width), make.linear(make.widths.hidden, width)) for _ in "ab"]
    return of_products(
        rows,
        [term.linear for term in terms],
        lambda ops: ops.apply_terms(terms),
        rival=lambda: [F.linear(term.x, term.linear.weight) for term in terms],
    )


def pair_feed(make: Maker, rows: int) -> Work:
    parts: list[Feed] = [make.feed() for _ in range(2)]
    h, *changes = (make.noise(rows, make.widths.hidden) for _ in range(3))
    return of_products(
        rows,
        [part.linear for part in parts],
        lambda ops: ops.feed(h, parts, changes=changes),
        rival=lambda: [F.linear(h, part.linear.weight) for part in parts],
    )


def head_logits(make: Maker, rows: int, half_of: HalfOf = whole) -> Work:
    h, norm = make.noise(rows, make.widths.hidden), make.norm()
    head, half = make.linear(make.widths.vocabulary, make.widths.hidden), half_of(h, norm)
    return of_products(
        rows,
        [head],
        lambda ops: [ops.head_logits(h, norm, head, half=half)],
        rival=lambda: F.linear(h, head.weight),
    )


def head_choose(make: Maker, rows: int) -> Work:
    """The greedy token without logits in memory."""
    h, norm, choice = make.noise(rows, make.widths.hidden), make.norm(), make.choice(rows)
    head = make.linear(make.widths.vocabulary, make.widths.hidden)

    def run(ops: Any) -> Outcome:
        ops.head_choose(h, norm, head, choice)
        return [choice.positions, choice.counts]  # in low precision near-ties resolve differently

    return of_products(rows, [head], run, rival=lambda: F.linear(h, head.weight).argmax(-1))


def choose(make: Maker, rows: int) -> Work:
    logits, choice = make.noise(rows, make.widths.vocabulary), make.choice(rows)

    def run(ops: Any) -> Outcome:
        ops.choose(logits, choice)
        return [choice.tokens, choice.positions, choice.counts]

    return Work(run, logits.nbytes, rival=lambda: logits.argmax(-1))


DECODE: dict[str, WorkMaker] = {
    "project_append": project_append,
    "attend_step": attend_step,
    "add_output": add_output,
    "feed": feed,
    "add_down": add_down,
    "head_logits": head_logits,
    "head_choose": head_choose,
    "choose": choose,
}
DECODE_ARRANGED: dict[str, WorkMaker] = {
    "parallel: project_feed": project_feed,
    "parallel: add_both": add_both,
    "pair: project_append": pair_project,
    "pair: apply_terms": pair_apply,
    "pair: feed": pair_feed,
}


def projection_of(make: Maker, rows: int) -> Projection:
    """A decode step's projection, or a prompt's if ``rows`` is a prompt's length."""
    if rows == make.widths.context:
        return make.projection(make.prompt_targets(), make.pages(1))
    return make.projection(make.step_targets(rows), make.pages(rows))


def of_products(
    rows: int,
    linears: list[Linear],
    run: Callable[[Any], Outcome],
    *,
    rival: Callable[[], object],
    entries: Callable[[], Outcome] = list,
) -> Work:
    weights = [linear.weight for linear in linears]
    flops = sum(2 * rows * weight.numel() for weight in weights)
    return Work(run, sum(w.nbytes for w in weights), flops, rival, entries)


def add(
    make: Maker, rows: int, widths: list[int], stream: int = 0, index: Tensor | None = None
) -> Work:
    """``widths``: the input width of each term; ``stream``: rows of the residual stream."""
    hidden = make.widths.hidden
    terms = [Term(make.noise(rows, width), make.linear(hidden, width)) for width in widths]
    h, arrivals = make.noise(stream or rows, hidden), make.integers([0] * ARRIVALS)
    return of_products(
        rows,
        [term.linear for term in terms],
        lambda ops: [ops.add_terms_(h, terms, index=index, arrivals=arrivals)],
        rival=lambda: [F.linear(term.x, term.linear.weight) for term in terms],
    )


def written(projection: Projection) -> Outcome:
    """The cache entries that the projection's rows have written."""
    pages: Pages | None = projection.pages
    assert pages is not None
    targets = projection.targets
    found = []
    for sequence in range(len(pages.table)):
        slots = targets.slots[targets.sequences == sequence].long()
        keys, values = entries_of(pages, sequence, int(slots.max()) + 1)
        found += [keys[:, slots], values[:, slots]]
    return found


def lazy(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that makes its inputs on first use, because most runs never need it."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run
