"""Products with a weight that is held as a bitmap and values, for few rows: zeros are not read.

    y[n] = x[n] @ weight.T + bias                              [n, M]

``x [n, E]``; ``weight [M, E]`` as ``bitmap [M, 4 * ceil(E / 32)]`` (one bit per element, lowest
first), ``values [k]`` (row by row) and ``starts [M + 1]``; see ``ops.bitmaps``.

A program owns ``BLOCK_M`` weight rows and walks their columns, ``BLOCK_E`` at a time. The place of
an element in ``values`` is its row's current place, plus the number of kept elements before it in
the tile: a prefix sum of bits. So each row's values stream through once, in order; lanes of zeros
load nothing. Grid ``(n / BLOCK_N, M / BLOCK_M)``: adjacent programs share weights. Tuning table:
``sparse_linear``, shape ``(M, E)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, tuning
from fastskip.kernels.blocks import split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.bitmaps import Packed


@triton.jit
def _sparse_linear_kernel(
    x_ptr,
    bitmap_ptr,
    starts_ptr,
    values_ptr,
    bias_ptr,
    out_ptr,
    stride_xn,
    stride_bm,
    rows,
    M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = m < M
    # A tuple of numbers stays constexpr only while it is not bound to a name.
    n = [tl.minimum(start + number, rows - 1) for number in (0, 1, 2, 3)[:BLOCK_N]]
    x_ptrs = [x_ptr + each.to(tl.int64) * stride_xn for each in n]
    bitmap_ptrs = bitmap_ptr + (m.to(tl.int64) * stride_bm)[:, None]
    place = tl.load(starts_ptr + m, mask=is_row, other=0)
    sums = [tl.zeros([BLOCK_M, BLOCK_E], tl.float32) for each in (0, 1, 2, 3)[:BLOCK_N]]
    for first in tl.range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        is_real = e < E
        is_entry = is_row[:, None] & is_real[None, :]
        byte = tl.load(bitmap_ptrs + (e // 8)[None, :], mask=is_entry, other=0).to(tl.int32)
        bit = (byte >> (e % 8)[None, :]) & 1
        rank = tl.cumsum(bit, axis=1) - bit
        weight = numerics.load(values_ptr + (place[:, None] + rank), bit == 1)
        place += tl.sum(bit, axis=1)
        x = [numerics.load(x_ptrs[i] + e, is_real) for i in (0, 1, 2, 3)[:BLOCK_N]]
        sums = [sums[i] + weight * x[i][None, :] for i in (0, 1, 2, 3)[:BLOCK_N]]
    for i in tl.static_range(BLOCK_N):
        y = tl.sum(sums[i], axis=1)
        if bias_ptr is not None:
            y += numerics.load(bias_ptr + m, is_row)
        out_row_ptr = out_ptr + (start + i).to(tl.int64) * M
        numerics.store(out_row_ptr + m, y, is_row & (start + i < rows))


def sparse_linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    *,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """``x @ weight.T + bias``: ``[n, E] -> [n, M]``, meant for few rows.

    ``packed`` and ``bias`` are on the device of ``x`` and have its dtype.
    """
    refuse_gradients(x=x, values=packed.values, bias=bias)
    assert x.stride(1) == 1 and packed.bitmap.is_contiguous()
    rows, size = x.shape
    shape = (len(packed.bitmap), size)
    blocks, options = split(config or tuning.config_for("sparse_linear", x.device, rows, shape))
    out = empty((rows, shape[0]), x.dtype, x.device)
    launch(
        _sparse_linear_kernel,
        (triton.cdiv(rows, blocks["BLOCK_N"]), triton.cdiv(shape[0], blocks["BLOCK_M"])),
        options,
        x_ptr=x,
        bitmap_ptr=packed.bitmap,
        starts_ptr=packed.starts,
        values_ptr=packed.values,
        bias_ptr=bias,
        out_ptr=out,
        stride_xn=x.stride(0),
        stride_bm=packed.bitmap.stride(0),
        rows=rows,
        M=shape[0],
        E=shape[1],
        **blocks,
    )
    return out
