"""The activation between the two products of an FFN.

    gated:  out = gate * sigmoid(gate) * up,  x = [gate | up]      [n, 2F] -> [n, F]
    ReLU:   out = max(x, 0)                                        [n, F] -> [n, F]

The output is dense. Grid ``(n, F / BLOCK_F)``. Tuning table: ``activate``, shape ``(F,)``.
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
from fastskip.ops.contracts import Activation


@triton.jit
def silu(x):
    """``x * sigmoid(x)`` in fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def relu(x):
    """``max(x, 0)``; NaN propagates."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _activate_kernel(
    x_ptr,
    out_ptr,
    stride_xn,
    F: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_real = column < F
    x_ptr += row * stride_xn
    if IS_GATED:
        gate = numerics.load(x_ptr + column, is_real)
        up = numerics.load(x_ptr + F + column, is_real)
        y = silu(gate) * up
    else:
        y = relu(numerics.load(x_ptr + column, is_real))
    numerics.store(out_ptr + row * F + column, y, is_real)


def activate(
    x: Tensor, activation: Activation, *, config: Mapping[str, Any] | None = None
) -> Tensor:
    """``[n, 2F] -> [n, F]`` if gated, else ``[n, F] -> [n, F]``; ``x`` is left unchanged."""
    refuse_gradients(x=x)
    assert x.stride(1) == 1
    is_gated = activation is Activation.GATED_SILU
    rows, width = x.shape
    width = width // 2 if is_gated else width
    options = dict(config or tuning.config_for("activate", x.device, rows, (width,)))
    block = options.pop("BLOCK_F")
    out = empty((rows, width), x.dtype, x.device)
    launch(
        _activate_kernel,
        (rows, triton.cdiv(width, block)),
        options,
        x_ptr=x,
        out_ptr=out,
        stride_xn=x.stride(0),
        F=width,
        IS_GATED=is_gated,
        BLOCK_F=block,
    )
    return out


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: 8 to 32 elements of a row per thread."""
    return [
        {"BLOCK_F": block, "num_warps": warps}
        for block in (512, 1024, 2048, 4096)
        for warps in (1, 2, 4, 8, 16)
        if 8 <= block // (32 * warps) <= 32
    ]
