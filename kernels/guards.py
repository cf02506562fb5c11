"""Guards: flags in device memory say which rows a launch is for.

A guarded launch reads the flags of its rows first, and a program that finds nothing to do touches
no weights. Programs that only leave cost time too, so a guarded launch has a bounded number of them
(``width_of``), and each goes through tiles: its own, then every ``tl.num_programs(1)``-th.

A row's flag is 1 if the row runs, else 0. Tables: ``guarded``, with rows and shape of the product;
``PROGRAMS`` is how many there are at most. A configuration of the kernel may name it as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastskip.kernels import tuning

TABLES = ("guarded",)


@triton.jit
def flagged(runs_ptr, n, rows):
    """Which of the rows ``n [N]`` run: ``[N]``; without flags all ``rows`` that there are."""
    inside = n < rows
    if runs_ptr is None:
        return inside
    else:
        return tl.load(runs_ptr + n, mask=inside, other=0) != 0


@triton.jit
def some(does):
    """Whether any of ``does [N]`` is true."""
    return tl.max(does.to(tl.int32), 0) > 0


def width_of(
    blocks: dict[str, int],
    device: torch.device,
    rows: int,
    shape: tuple[int, int],
    tiles: int,
    *,
    is_guarded: bool,
) -> int:
    """Programs for ``tiles`` of a product: all, or what the table allows a guarded launch.

    Blocks of rows share what is allowed. ``PROGRAMS`` is taken out of ``blocks``.
    """
    named = blocks.pop("PROGRAMS", None)
    if not is_guarded:
        return tiles
    most: int = named or tuning.config_for("guarded", device, rows, shape)["PROGRAMS"]
    return min(tiles, max(1, most // -(-max(rows, 1) // blocks["BLOCK_N"])))


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Numbers of programs worth timing: 1 to 8 for each of 132 multiprocessors."""
    return [{"PROGRAMS": 132 * each} for each in (1, 2, 4, 8)]
