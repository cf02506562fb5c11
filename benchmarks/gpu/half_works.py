"""The operations of a decode step that leave or read half norms, as units of work.

Readers get the half norm of noise, in as many parts as an update in tiles of 16 or 64 columns
leaves. In fp16 there are no half norms, and the whole norm is computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import works
from benchmarks.gpu.inputs import Maker
from benchmarks.gpu.works import Outcome, Work, WorkMaker, of_products
from fastskip.ops import fused
from fastskip.ops.contracts import ARRIVALS, HalfNorm, Norm, Term


def add_output(make: Maker, rows: int) -> Work:
    return add(make, rows, make.widths.heads * make.widths.head_dim)


def add_down(make: Maker, rows: int) -> Work:
    return add(make, rows, make.widths.ffn)


def add(make: Maker, rows: int, width: int) -> Work:
    hidden = make.widths.hidden
    term = Term(make.noise(rows, width), make.linear(hidden, width))
    h, norm, arrivals = make.noise(rows, hidden), make.norm(), make.integers([0] * ARRIVALS)
    squares = h.new_empty(0)

    def run(ops: Any) -> Outcome:
        nonlocal squares
        half = ops.add_terms_and_halve_(h, [term], norm, arrivals=arrivals)
        half = half or fused.halve(h, norm)  # where there is none: all have the same outputs
        squares = half.squares
        return [h, half.rows]

    return of_products(
        rows,
        [term.linear],
        run,
        rival=lambda: F.linear(term.x, term.linear.weight),
        entries=lambda: [of_mean_square(squares, h)],
    )


def of_mean_square(squares: Tensor, h: Tensor) -> Tensor:
    """The summed parts of a mean square, relative to that of the stored rows: the parts have full
    precision and must not be blamed for the rounding of ``h``."""
    share = squares.sum(1).double() / h.double().square().mean(1)
    return share.to(squares.dtype)


def half_of(h: Tensor, norm: Norm) -> HalfNorm | None:
    """The half norm of ``h [n, D]``, or ``None`` if it has none."""
    if not HalfNorm.is_of(norm, h.dtype):
        return None
    rows, width = h.shape
    parts = width // (16 if rows <= 4 else 64) or 1
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    squares = wide.view(rows, parts, -1).square().sum(2) / width
    return HalfNorm(norm, h * norm.weight, squares)


DECODE_HALVED: dict[str, WorkMaker] = {
    "half norm: project_append": partial(works.project_append, half_of=half_of),
    "half norm: add_output": add_output,
    "half norm: feed": partial(works.feed, half_of=half_of),
    "half norm: add_down": add_down,
    "half norm: head_logits": partial(works.head_logits, half_of=half_of),
}
