"""Split tiles (split-K): several programs each sum a part of a tile, and the last one adds these.

If a product has few tiles, wide tiles leave multiprocessors idle, and narrow ones reread the rows.
So ``SPLITS`` programs share a tile: each sums an equal part of the reduction dimension and stores
the sum in fp32 scratch. The last to arrive adds the parts, always in the same order so that results
do not depend on which one it is, and runs the epilogue.

``arrivals``: as in ``arrivals.py``, at least one per tile. Tuning tables: ``<kernel>_split``, by
rows and shape like the kernel's own, which they override.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels.arrivals import is_last
from fastskip.ops.allocate import empty

Shape = tuple[int, int]
MOST_STREAMED = 4
"""Up to this many rows, those of the streaming form, a decode step's tiles are never split."""


class Shared(NamedTuple):
    """Parts of tiles, fp32, and arrival counters; only for tiles that are split."""

    parts: Any
    arrivals: Any


@triton.jit
def leave(total, parts_ptr, tile, part, SPLITS: tl.constexpr):
    """Stores ``total [A, B]``, fp32, as a part of a tile."""
    SIZE: tl.constexpr = total.shape[0] * total.shape[1]
    tl.store(parts_ptr + (tile * SPLITS + part) * SIZE + _places(total), total)


@triton.jit
def gather(total, parts_ptr, tile, SPLITS: tl.constexpr):
    """The sum of all parts of a tile; ``total``: this program's own part, for its shape."""
    SIZE: tl.constexpr = total.shape[0] * total.shape[1]
    places = parts_ptr + tile * SPLITS * SIZE + _places(total)
    found = tl.zeros(total.shape, tl.float32)
    # Written by other multiprocessors during this launch: bypass the L1 cache.
    for part in tl.static_range(SPLITS):
        found += tl.load(places + part * SIZE, cache_modifier=".cg")
    return found


@triton.jit
def put_together(total, shared, tile, SPLITS: tl.constexpr):
    """The sum of the ``total`` of a tile's programs, along the third axis of the grid; and whether
    this program is the last, which continues with the sum. The others have nothing to store."""
    leave(total, shared.parts, tile, tl.program_id(2), SPLITS)
    goes_on = is_last(shared.arrivals + tile, SPLITS)
    if goes_on:
        total = gather(total, shared.parts, tile, SPLITS)
    return total, goes_on


@triton.jit
def _places(total):
    rows = tl.arange(0, total.shape[0])[:, None]
    return rows * total.shape[1] + tl.arange(0, total.shape[1])[None]


def splits_of(
    blocks: dict[str, int], arrivals: Tensor | None, tiles: int, inner: Sequence[int]
) -> int:
    """How many programs share a tile: ``SPLITS``, which is removed from ``blocks``, or one if
    ``arrivals`` are too few or the reduction, ``inner`` elements of each term, has no such parts.

    Parts begin where wide loads can.
    """
    wanted = blocks.pop("SPLITS", 1)
    fits = arrivals is not None and tiles <= len(arrivals)
    return wanted if fits and all(each % (16 * wanted) == 0 for each in inner) else 1


def arguments_of(
    blocks: dict[str, int],
    arrivals: Tensor | None,
    tiles: int,
    inner: Sequence[int],
    device: torch.device,
    *,
    sums: int = 1,
) -> dict[str, Any]:
    """The kernel arguments for ``tiles`` that programs may share, as many as ``splits_of`` says.

    ``sums``: tiles of ``BLOCK_M * BLOCK_N`` that each program sums.
    """
    programs, shared = splits_of(blocks, arrivals, tiles, inner), None
    if programs > 1:
        count = sums * tiles * programs * blocks["BLOCK_M"] * blocks["BLOCK_N"]
        shared = Shared(empty((count,), torch.float32, device), arrivals)
    return {"shared": shared, "SPLITS": programs}


def grid_of(grid: tuple[int, ...], shared: Mapping[str, Any]) -> tuple[int, ...]:
    """The grid, with one more axis if programs share tiles."""
    return (*grid, shared["SPLITS"]) if shared["SPLITS"] > 1 else grid


def add_terms_split_candidates(rows: int, shape: Shape) -> list[dict[str, int]]:
    """Configurations of split tiles worth timing."""
    return step_candidates(rows, shape)


def step_candidates(rows: int, shape: Shape) -> list[dict[str, int]]:
    """The same for any product of a decode step."""
    if rows <= MOST_STREAMED:
        return []
    block = min(64, max(16, triton.next_power_of_2(rows)))
    return [
        {
            **{"BLOCK_M": m, "BLOCK_N": block, "BLOCK_E": e, "STAGES": stages},
            **{"num_warps": warps, "SPLITS": splits},
        }
        for m, e, stages, warps in ((64, 128, 4, 4), (64, 64, 6, 4), (128, 64, 4, 8))
        for splits in (2, 4, 8)
        if _is_worth(m, splits, shape)
    ]


def linear_rows_split_candidates(rows: int, shape: Shape) -> list[dict[str, int]]:
    """Configurations of split tiles worth timing, for the text rows of a prompt."""
    if rows > 128:
        return []
    return [
        {
            **{"BLOCK_N": 64, "BLOCK_M": m, "BLOCK_E": e, "GROUP": 8, "STAGES": stages},
            **{"num_warps": warps, "SPLITS": splits},
        }
        for m, e, stages, warps in (
            (64, 64, 4, 4),
            (64, 128, 3, 4),
            (128, 64, 3, 4),
            (128, 64, 4, 8),
        )
        for splits in (2, 4, 8)
        if _is_worth(m, splits, shape)
    ]


def _is_worth(width: int, splits: int, shape: Shape) -> bool:
    """Whether programs fill 132 multiprocessors one to three times, with parts of equal size."""
    return 96 <= splits * shape[0] // width <= 400 and shape[1] % (16 * splits) == 0
