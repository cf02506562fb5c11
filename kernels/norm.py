"""RMS norm and LayerNorm over rows, including the residual change that precedes them.

    x = h[index] + change                                     [n, D], in fp32
    RMS norm:   x * rsqrt(mean(x^2) + epsilon) * weight
    LayerNorm:  (x - mean(x)) * rsqrt(var(x) + epsilon) * weight + bias

``h [N, D]``, ``change [n, D]``, ``weight [D]``, ``bias [D]``; the output ``[n, D]`` is dense. Grid
``(n,)``: a program holds one row in registers; where ``count [1]``, on the device, is less than
``n``, programs beyond it exit at once. Tuning table: ``normalize``, shape ``(D,)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, overlap, tuning
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Norm


@triton.jit
def _normalize_kernel(
    h_ptr,
    index_ptr,
    count_ptr,
    change_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_hn,
    stride_cn,
    epsilon,
    D: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    out_row = tl.program_id(0).to(tl.int64)
    if count_ptr is not None:
        count = tl.load(count_ptr)
        if out_row >= count:
            return
    row = out_row
    if index_ptr is not None:
        row = tl.load(index_ptr + out_row).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    is_real = column < D
    x = numerics.load(h_ptr + row * stride_hn + column, is_real)
    if change_ptr is not None:
        x += numerics.load(change_ptr + out_row * stride_cn + column, is_real)
    # Loaded before the reduction, so that the two latencies overlap.
    weight = numerics.load(weight_ptr + column, is_real)
    if IS_CENTRED:
        x = tl.where(is_real, x - tl.sum(x) / D, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x) / D + epsilon) * weight
    if bias_ptr is not None:
        y += numerics.load(bias_ptr + column, is_real)
    numerics.store(out_ptr + out_row * D + column, y, is_real)


def normalize(
    h: Tensor,
    norm: Norm,
    *,
    index: Tensor | None = None,
    count: Tensor | None = None,
    change: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """``norm(h[index] + change)``: ``h [N, D] -> [n, D]``; ``h`` is left unchanged.

    ``count [1]`` int32: how many of the ``n`` rows are computed; all if ``None``.
    """
    refuse_gradients(h=h, change=change)
    assert h.stride(1) == 1 and (change is None or change.stride(1) == 1)
    rows, size = len(h) if index is None else len(index), h.shape[1]
    options = dict(config or tuning.config_for("normalize", h.device, rows, (size,)))
    out = empty((rows, size), h.dtype, h.device)
    launch(
        _normalize_kernel,
        (rows,),
        options,
        is_guarded=count is not None,
        h_ptr=h,
        index_ptr=index,
        count_ptr=count,
        change_ptr=change,
        weight_ptr=norm.weight,
        bias_ptr=norm.bias,
        out_ptr=out,
        stride_hn=h.stride(0),
        stride_cn=0 if change is None else change.stride(0),
        epsilon=norm.epsilon,
        D=size,
        IS_CENTRED=norm.is_centred,
        BLOCK_D=triton.next_power_of_2(size),
    )
    return out


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: 8 (a wide load in half precision) to 64 elements of a row per
    thread; a single warp where none fits.

    Never 2 warps: Triton 3.6 miscompiles some reductions there.
    """
    (size,) = shape
    fitting = [warps for warps in (1, 4, 8, 16, 32) if 8 <= size / (32 * warps) <= 64]
    return [{"num_warps": warps} for warps in fitting or [1]]
