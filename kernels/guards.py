"""Guards: flags in device memory say which rows a launch computes.

A guarded launch first reads the flags of its rows, and a program with nothing to do reads no
weights. Even programs that exit at once cost time, so a guarded launch has a bounded number of them
(``width_of``), and each loops over tiles: its own, then every ``tl.num_programs(1)``-th. Persistent
programs (``operands.share_out``) are few enough already.

A row's flag is 1 if the row runs, else 0. Tuning table: ``guarded``, by rows and shape of the
product; ``PROGRAMS`` is the maximum number of programs. Its entries override those of the kernel's
own table: a loop over tiles takes registers, so an entry may also name more warps where the kernel
would spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastskip.kernels import overlap

TABLE = "guarded"
TABLES = (TABLE,)


@triton.jit
def flagged(runs_ptr, n, rows, READS_AHEAD: tl.constexpr = False):
    """Which of the rows ``n [N]`` run: ``[N]``; without flags, those below ``rows``.

    ``READS_AHEAD``: as for ``overlap.read``.
    """
    inside = n < rows
    if runs_ptr is None:
        return inside
    else:
        return overlap.read(runs_ptr + n, inside, READS_AHEAD) != 0


@triton.jit
def some(does):
    """Whether any of ``does [N]`` is true."""
    return tl.max(does.to(tl.int32), 0) > 0


def width_of(blocks: dict[str, int], rows: int, tiles: int, *, is_guarded: bool) -> int:
    """Programs for ``tiles`` of a product: one per tile, or up to the limit of a guarded launch.

    Blocks of rows share that limit. ``PROGRAMS`` is removed from ``blocks``.
    """
    most = blocks.pop("PROGRAMS", None)
    if not is_guarded or most is None:
        return tiles
    return min(tiles, max(1, most // -(-max(rows, 1) // blocks["BLOCK_N"])))


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Numbers of programs worth timing: 1 to 16 for each of 132 multiprocessors."""
    return [{"PROGRAMS": 132 * each} for each in (1, 2, 4, 8, 16)]
