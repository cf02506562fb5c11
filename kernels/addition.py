"""Adds rows to the residual stream, after products that the vendor's library computes.

    h[index[n]] += factor * x[n]                               [N, D], in place

``x [n, D]``; a broadcast row (a bias) has stride 0. ``count [1]``, on the device, is how many of
the ``n`` rows are added. ``index`` has no duplicates, so no atomics are needed. Grid
``(n, D / BLOCK_D)``. Tuning table: ``add_rows``, shape ``(D,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, overlap, tuning
from fastskip.kernels.blocks import split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch


@triton.jit
def _add_rows_kernel(
    h_ptr,
    index_ptr,
    x_ptr,
    count_ptr,
    stride_hn,
    stride_xn,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    n = tl.program_id(0).to(tl.int64)
    if count_ptr is not None:
        rows = tl.load(count_ptr)
        if n >= rows:
            return
    row = n
    if index_ptr is not None:
        row = tl.load(index_ptr + n).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_real = column < D
    place_ptr = h_ptr + row * stride_hn + column
    change = factor * numerics.load(x_ptr + n * stride_xn + column, is_real)
    numerics.store(place_ptr, numerics.load(place_ptr, is_real) + change, is_real)


def add_rows_(
    h: Tensor,
    x: Tensor,
    *,
    index: Tensor | None = None,
    count: Tensor | None = None,
    factor: float = 1.0,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """``h[index] += factor * x``, in place: ``h [N, D]``, ``x [n, D]``. Returns ``h``.

    ``count [1]`` int32: how many of the ``n`` rows are added; all if ``None``.
    """
    refuse_gradients(h=h, x=x)
    assert h.stride(1) == 1 and x.stride(1) == 1
    rows, size = x.shape
    blocks, options = split(config or tuning.config_for("add_rows", h.device, rows, (size,)))
    launch(
        _add_rows_kernel,
        (rows, triton.cdiv(size, blocks["BLOCK_D"])),
        options,
        is_guarded=count is not None,
        h_ptr=h,
        index_ptr=index,
        x_ptr=x,
        count_ptr=count,
        stride_hn=h.stride(0),
        stride_xn=x.stride(0),
        factor=float(factor),
        D=size,
        **blocks,
    )
    return h


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: 8 to 32 elements of a row per thread."""
    return [
        {"BLOCK_D": block, "num_warps": warps}
        for block in (1024, 2048, 4096)
        for warps in (1, 2, 4, 8)
        if 8 <= block // (32 * warps) <= 32
    ]
