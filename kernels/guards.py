"""Guards: flags in device memory say which rows a launch is for.

A guarded launch reads the flags of its rows first, and a program that finds nothing to do touches
no weights. Programs that only leave cost time too, so a guarded launch has a bounded number of them
(``width_of``), and each goes through tiles: its own, then every ``tl.num_programs(1)``-th. Programs
that are long for themselves (``operands.share_out``) are few enough.

A row's flag is 1 if the row runs, else 0. Tables: ``guarded``, with rows and shape of the product;
``PROGRAMS`` is how many there are at most. They are laid over the kernel's own: a loop over tiles
takes registers, so such an entry may also name more warps, where it would spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastskip.kernels import overlap

TABLE = "guarded"
TABLES = (TABLE,)


@triton.jit
def flagged(runs_ptr, n, rows, READS_AHEAD: tl.constexpr = False):
    """Which of the rows ``n [N]`` run: ``[N]``; without flags all ``rows`` that there are.

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
    """Programs for ``tiles`` of a product: all, or as many as a guarded launch may have.

    Blocks of rows share what is allowed. ``PROGRAMS`` is taken out of ``blocks``.
    """
    most = blocks.pop("PROGRAMS", None)
    if not is_guarded or most is None:
        return tiles
    return min(tiles, max(1, most // -(-max(rows, 1) // blocks["BLOCK_N"])))


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Numbers of programs worth timing: 1 to 16 for each of 132 multiprocessors."""
    return [{"PROGRAMS": 132 * each} for each in (1, 2, 4, 8, 16)]
