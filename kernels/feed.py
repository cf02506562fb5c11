"""Norm, first product and activation of an FFN, in one launch, for few rows.

    x = norm(h[index] + change)                                [n, D]
    gated:  out = silu(x @ gate.T) * (x @ up.T)                weight [2F, D], gate first
    ReLU:   out = max(x @ weight.T + bias, 0)                  weight [F, D]

``h [N, D]``, ``change [n, D]``, ``bias [2F]`` or ``[F]``; the output ``[n, F]`` is dense. A program
owns ``BLOCK_M`` weight rows: gate rows and the up rows that belong to them, one after the other.
Grid ``(n / BLOCK_N, parts * weight rows / BLOCK_M)``, where a pair of blocks makes two parts;
programs that share weights are neighbours. Tables: kernel ``feed``, shape ``(weight rows, D)``.

With flags (``guards``) the rows that run are computed, and nothing where there are none. Grid then
``(n / BLOCK_N, PROGRAMS)``, tile after tile.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, numerics, overlap, products
from fastskip.kernels.activation import relu, silu
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    distance,
    kind_of,
    product_candidates,
    rows_read,
)
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, Feed
from fastskip.ops.routes import Chosen


@triton.jit
def rows_of(tile, F: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Weight rows ``[BLOCK_M]`` of a tile, within the weight."""
    if IS_GATED:
        column = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
        return products.pair_rows(tl.minimum(column, F - 1), F, F)
    else:
        return tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M), F - 1)


@triton.jit
def tiles_of(F: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles there are."""
    return tl.cdiv(2 * F if IS_GATED else F, BLOCK_M)


@triton.jit
def store_activated(
    y,
    tile,
    n,
    does,
    out_ptr,
    F: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """``y [BLOCK_M, BLOCK_N]``, the product of ``rows_of``, to ``out [n, F]`` where ``does``."""
    if IS_GATED:
        gate, up = products.split_pairs(y)
        value = silu(gate) * up
    else:
        value = relu(y)
    column = tile * value.shape[0] + tl.arange(0, value.shape[0])
    out_ptr = out_ptr + (n.to(tl.int64) * F)[None, :] + column[:, None]
    numerics.store(out_ptr, value, (column < F)[:, None] & does[None, :])


@triton.jit
def _feed_tile(
    tile,
    start,
    n,
    does,
    x_ptr,
    index_ptr,
    change_ptr,
    gain_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_xn,
    stride_cn,
    stride_wm,
    epsilon,
    rows,
    D: tl.constexpr,
    F: tl.constexpr,
    IS_GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What ``BLOCK_M`` weight rows yield, of the rows ``does [BLOCK_N]``."""
    FORM: tl.constexpr = products.STREAM if BLOCK_N < 16 else products.TENSOR
    m = rows_of(tile, F, IS_GATED, BLOCK_M)
    if bias_ptr is not None:
        bias = numerics.load(bias_ptr + m)
    y = products.product(
        weight_ptr,
        stride_wm,
        m,
        x_ptr,
        stride_xn,
        index_ptr,
        change_ptr,
        stride_cn,
        start,
        rows,
        gain_ptr,
        shift_ptr,
        epsilon,
        D,
        NORM,
        FORM,
        BLOCK_N,
        BLOCK_E,
        STAGES,
    )
    if bias_ptr is not None:
        y += bias[:, None]
    store_activated(y, tile, n, does, out_ptr, F, IS_GATED)


@triton.jit
def _feed_kernel(
    x_ptr,
    index_ptr,
    change_ptr,
    gain_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    runs_ptr,
    out_ptr,
    stride_xn,
    stride_cn,
    stride_wm,
    x_distance,
    change_distance,
    gain_distance,
    shift_distance,
    weight_distance,
    bias_distance,
    epsilon,
    rows,
    D: tl.constexpr,
    F: tl.constexpr,
    IS_GATED: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    if PARTS == 2:
        tiles = tl.num_programs(1) // 2
        part = (tile // tiles).to(tl.int64)
        tile %= tiles
        x_ptr += part * x_distance
        weight_ptr += part * weight_distance
        out_ptr += part * rows * F
        if change_ptr is not None:
            change_ptr += part * change_distance
        if gain_ptr is not None:
            gain_ptr += part * gain_distance
        if shift_ptr is not None:
            shift_ptr += part * shift_distance
        if bias_ptr is not None:
            bias_ptr += part * bias_distance
    if OVERLAP is not None:
        m = rows_of(tile, F, IS_GATED, BLOCK_M)
        overlap.begin_with(weight_ptr, stride_wm, m, D, OVERLAP)

    if runs_ptr is None:
        _feed_tile(
            tile,
            start,
            n,
            n < rows,
            x_ptr,
            index_ptr,
            change_ptr,
            gain_ptr,
            shift_ptr,
            weight_ptr,
            bias_ptr,
            out_ptr,
            stride_xn,
            stride_cn,
            stride_wm,
            epsilon,
            rows,
            D,
            F,
            IS_GATED,
            NORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
        )
    else:
        TILES: tl.constexpr = tiles_of(F, IS_GATED, BLOCK_M)
        does = guards.flagged(runs_ptr, n, rows)
        begin = tl.where(guards.some(does), 0, TILES)
        for number in tl.range(begin + tile, TILES, tl.num_programs(1), disable_licm=True):
            _feed_tile(
                number,
                start,
                n,
                does,
                x_ptr,
                index_ptr,
                change_ptr,
                gain_ptr,
                shift_ptr,
                weight_ptr,
                bias_ptr,
                out_ptr,
                stride_xn,
                stride_cn,
                stride_wm,
                epsilon,
                rows,
                D,
                F,
                IS_GATED,
                NORM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
            )


def feed(
    h: Tensor,
    feeds: Sequence[Feed],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] | None = None,
    chosen: Chosen | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Norm, first product and activation of an FFN, of one block or of the two of a pair.

    ``changes``: what each block adds to ``h`` before its norm, ``[n, D]`` each. ``chosen``: the
    rows that run, without ``index``. Returns ``[n, F]`` each. A pair takes one launch if its blocks
    are of one shape and run for all rows.
    """
    refuse_gradients(h=h, **{f"changes[{i}]": each for i, each in enumerate(changes or ())})
    strides = set() if changes is None else {each.stride(0) for each in changes}
    is_alike = _kind(feeds[0]) == _kind(feeds[-1]) and len(strides) <= 1
    if len(feeds) > 1 and (chosen is not None or not is_alike):
        return [
            found
            for number, each in enumerate(feeds)
            for found in feed(
                h,
                [each],
                index=index,
                changes=None if changes is None else [changes[number]],
                chosen=chosen,
                config=config,
            )
        ]
    linear, width = feeds[0].linear, feeds[0].width
    rows, parts = len(h) if index is None else len(index), len(feeds)
    shape = (linear.weight.shape[0], linear.weight.shape[1])
    is_guarded = chosen is not None
    if is_guarded:
        config = guards.config_of("feed", config, h.device, rows, shape)
    blocks, options = blocks_for("feed", config, h, rows, shape)
    is_apart = bool(blocks.pop("NORM_APART", False))
    tiles = parts * triton.cdiv(shape[0], blocks["BLOCK_M"])
    programs = guards.width_of(blocks, rows, tiles, is_guarded=is_guarded)
    out = empty((parts, rows, width), h.dtype, h.device)
    x = rows_read(h, [each.norm for each in feeds], index=index, changes=changes, is_apart=is_apart)
    launch(
        _feed_kernel,
        (triton.cdiv(rows, blocks["BLOCK_N"]), programs),
        options,
        is_guarded=is_guarded,
        **x.arguments,
        weight_ptr=linear.weight,
        bias_ptr=linear.bias,
        runs_ptr=None if chosen is None else chosen.runs,
        out_ptr=out,
        stride_wm=linear.weight.stride(0),
        weight_distance=distance([each.linear.weight for each in feeds]),
        bias_distance=distance([each.linear.bias for each in feeds]),
        rows=rows,
        D=shape[1],
        F=width,
        IS_GATED=feeds[0].activation is Activation.GATED_SILU,
        PARTS=parts,
        **blocks,
    )
    return list(out)


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing."""
    return product_candidates(rows)


def _kind(part: Feed) -> Hashable:
    has_bias = part.linear.bias is not None
    return part.activation, part.width, has_bias, kind_of(part.norm, part.linear)
