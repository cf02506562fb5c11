"""GEMM over a prompt's rows, gathered from one tensor and scattered into another.

    y[n] = x[index[n]] @ weight.T + bias                       [n, M], or [n, 2F] if gated
    z = y, relu(y), or silu(y[:F]) * y[F:]                     gate and up in one program
    out[out_index[n]] = z, or += factor * z                    [N, M] or [N, F]

``x [N, E]``, ``weight [M, E]``, ``bias [M]``. ``count [1]``, on the device, is how many of the
``n`` rows are computed: the grid covers all of them, and programs beyond the count exit at once.

Grid ``(n / BLOCK_N * M / BLOCK_M,)``: within ``GROUP`` row blocks the row is the faster index, so
that programs which share weights run together and find them, and their rows, in the L2 cache. Rows
are the M operand of the matrix instructions: 64 of them fill WGMMA. A narrow ``BLOCK_M`` spreads
even so few over all multiprocessors; or wide tiles are split (``splits``), which rereads rows less
often: ``SPLITS`` programs each, a second axis. Tuning table: ``linear_rows``, shape ``(M, E)``, for
a gated product ``(F, E)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, splits, tuning
from fastskip.kernels.activation import relu, silu
from fastskip.kernels.arrivals import is_last
from fastskip.kernels.blocks import split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, Linear

LINEAR = tl.constexpr(0)
RELU = tl.constexpr(1)
GATED = tl.constexpr(2)
FORMS = {None: LINEAR, Activation.RELU: RELU, Activation.GATED_SILU: GATED}


@triton.jit
def _tile(program, row_blocks, column_blocks, GROUP: tl.constexpr):
    """The row block and the column block that a program computes."""
    per_group = GROUP * column_blocks
    first = program // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = program % per_group
    return first + within % size, within // size


@triton.jit
def _linear_rows_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    out_index_ptr,
    count_ptr,
    shared,
    stride_xn,
    stride_wm,
    stride_on,
    rows,
    factor,
    M: tl.constexpr,
    E: tl.constexpr,
    FORM: tl.constexpr,
    DOES_ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row_block, column_block = _tile(
        tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP
    )
    if count_ptr is not None:
        rows = tl.minimum(rows, tl.load(count_ptr))
        if row_block * BLOCK_N >= rows:
            return
    n = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = column_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows and columns past the end repeat the last one: the loop needs no masks for them.
    source = tl.minimum(n, rows - 1)
    if index_ptr is not None:
        source = tl.load(index_ptr + source)
    owned = tl.minimum(m, M - 1)
    e = tl.arange(0, BLOCK_E)
    SIZE: tl.constexpr = E // SPLITS
    if SPLITS > 1:
        x_ptr += tl.program_id(1) * SIZE
        weight_ptr += tl.program_id(1) * SIZE
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xn + e[None, :]
    weight_ptrs = weight_ptr + owned.to(tl.int64)[:, None] * stride_wm + e[None, :]
    # Gate and up of a column lie F rows apart.
    up_ptrs = weight_ptrs + M * stride_wm.to(tl.int64)

    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in tl.range(0, SIZE, BLOCK_E, num_stages=STAGES):
        is_real = None if SIZE % BLOCK_E == 0 else (first + e < SIZE)[None, :]
        other = None if SIZE % BLOCK_E == 0 else 0.0
        x = tl.load(x_ptrs + first, mask=is_real, other=other)
        weight = tl.load(weight_ptrs + first, mask=is_real, other=other)
        y = numerics.dot(x, tl.trans(weight), y)
        if FORM == GATED:
            weight = tl.load(up_ptrs + first, mask=is_real, other=other)
            up = numerics.dot(x, tl.trans(weight), up)

    if SPLITS > 1:
        tile, part = tl.program_id(0), tl.program_id(1)
        splits.leave(y, shared.parts, tile, part, SPLITS)
        if FORM == GATED:
            splits.leave(up, shared.parts, tl.num_programs(0) + tile, part, SPLITS)
        if not is_last(shared.arrivals + tile, SPLITS):
            return
        y = splits.gather(y, shared.parts, tile, SPLITS)
        if FORM == GATED:
            up = splits.gather(up, shared.parts, tl.num_programs(0) + tile, SPLITS)
    if bias_ptr is not None:
        y += numerics.load(bias_ptr + owned)[None, :]
    if FORM == RELU:
        y = relu(y)
    if FORM == GATED:
        if bias_ptr is not None:
            up += numerics.load(bias_ptr + M + owned)[None, :]
        y = silu(y) * up
    place = tl.minimum(n, rows - 1)
    if out_index_ptr is not None:
        place = tl.load(out_index_ptr + place)
    out_ptrs = out_ptr + place.to(tl.int64)[:, None] * stride_on + m[None, :]
    inside = (n < rows)[:, None] & (m < M)[None, :]
    if DOES_ADD:
        y = numerics.load(out_ptrs, inside) + factor * y
    numerics.store(out_ptrs, y, inside)


def linear_rows(
    x: Tensor,
    weights: Linear,
    *,
    index: Tensor | None = None,
    out: Tensor | None = None,
    out_index: Tensor | None = None,
    count: Tensor | None = None,
    activation: Activation | None = None,
    onto: bool = False,
    factor: float = 1.0,
    arrivals: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """``activation(x[index] @ weight.T + bias)`` into ``out[out_index]``.

    ``onto``: ``factor`` times the result is added to what is there.

    ``x [N, E]``; ``index``, ``out_index [n]`` int32, neither with duplicates; ``count [1]`` int32:
    how many of the ``n`` rows are computed. Returns ``out``, by default a new ``[n, M]``, or
    ``[n, F]`` if gated. Rows that are not computed are left unchanged. ``arrivals``: as in
    ``splits``; tiles are split only with them.
    """
    refuse_gradients(x=x, out=out)
    if out is None and (onto or out_index is not None):
        raise ValueError("out: missing, but onto and out_index need a tensor to write to")
    assert x.stride(1) == 1 and (out is None or out.stride(1) == 1)
    form = FORMS[activation]
    rows, inner = len(x) if index is None else len(index), x.shape[1]
    width = len(weights.weight) // (2 if form is GATED else 1)
    if out is None:
        out = empty((rows, width), x.dtype, x.device)
    shape = width, inner
    over = None if arrivals is None else "linear_rows_split"
    chosen = config or tuning.config_over("linear_rows", over, x.device, rows, shape)
    blocks, options = split(chosen)
    if x.element_size() > 2:
        # Full-precision products keep their operands in registers: larger tiles would spill.
        limits = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_E": 32, "STAGES": 3}
        blocks |= {name: min(blocks[name], most) for name, most in limits.items()}
        options |= {"num_warps": 8}
    tiles = triton.cdiv(rows, blocks["BLOCK_N"]) * triton.cdiv(width, blocks["BLOCK_M"])
    sums = 2 if form is GATED else 1
    shared = splits.arguments_of(blocks, arrivals, tiles, [inner], x.device, sums=sums)
    launch(
        _linear_rows_kernel,
        splits.grid_of((tiles,), shared),
        options,
        is_guarded=count is not None,
        x_ptr=x,
        index_ptr=index,
        weight_ptr=weights.weight,
        bias_ptr=weights.bias,
        out_ptr=out,
        out_index_ptr=out_index,
        count_ptr=count,
        **shared,
        stride_xn=x.stride(0),
        stride_wm=weights.weight.stride(0),
        stride_on=out.stride(0),
        rows=rows,
        factor=float(factor),
        M=width,
        E=inner,
        FORM=form.value,
        DOES_ADD=onto,
        **blocks,
    )
    return out


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing, with room for the second weight of a gated product."""
    sizes = (
        (64, 16, 256, 4, 4),
        (64, 32, 128, 5, 4),
        (64, 32, 256, 3, 4),
        (64, 64, 64, 5, 4),
        (64, 64, 128, 3, 4),
        (64, 64, 128, 4, 4),
        (64, 128, 64, 4, 4),
        (64, 128, 128, 2, 4),
        (128, 64, 64, 4, 4),
        (128, 64, 128, 3, 8),
        (128, 128, 64, 3, 8),
        (128, 128, 64, 4, 8),
        (128, 256, 64, 3, 8),
        (256, 128, 64, 3, 8),
    )
    return [
        {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_E": e, "GROUP": 8, "STAGES": s, "num_warps": warps}
        for n, m, e, s, warps in sizes
        if n < 2 * max(rows, 64) and (n + 2 * m) * e * 2 * s <= 224 * 1024
    ]
