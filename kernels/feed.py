"""Norm, first product and activation of an FFN in one launch, for few rows.

    x = norm(h[index] + change)                                [n, D]
    gated:  out = silu(x @ gate.T) * (x @ up.T)                weight [2F, D], gate first
    ReLU:   out = max(x @ weight.T + bias, 0)                  weight [F, D]

``h [N, D]``, ``change [n, D]``, ``bias [2F]`` or ``[F]``; the output ``[n, F]`` is dense. A program
owns ``BLOCK_M`` weight rows; if gated, gate rows alternate with their up rows. Grid
``(n / BLOCK_N, parts * weight rows / BLOCK_M)``, where a pair of blocks makes two parts; adjacent
programs share weights. Tuning table: ``feed``, shape ``(weight rows, D)``. With ``LONG`` in a
configuration the grid has that many persistent programs (``operands.share_out``).

With flags (``guards``) only the rows that run are computed, and row blocks without any do nothing.
The grid is then ``(n / BLOCK_N, PROGRAMS)``, and each program loops over tiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, hops, numerics, overlap, products, splits
from fastskip.kernels.activation import relu, silu
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    half_candidates,
    kind_of,
    product_candidates,
    rows_read,
    share_out,
    weights_of,
    weights_step,
)
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, Feed, HalfNorm
from fastskip.ops.routes import Chosen


@triton.jit
def rows_of(tile, F: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Weight rows ``[BLOCK_M]`` of a tile, clamped to the weight."""
    if IS_GATED:
        column = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
        return products.pair_rows(tl.minimum(column, F - 1), F, F)
    else:
        return tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M), F - 1)


@triton.jit
def tiles_of(F: tl.constexpr, IS_GATED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The number of tiles."""
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
    """Activates ``y [BLOCK_M, BLOCK_N]``, the product of ``rows_of``, and stores it to
    ``out [n, F]`` where ``does``."""
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
    part,
    inputs,
    inputs_step,
    weights,
    out_ptr,
    rows,
    shared,
    D: tl.constexpr,
    F: tl.constexpr,
    IS_GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The output of ``BLOCK_M`` weight rows for the rows ``does [BLOCK_N]``, or this program's
    share of it."""
    m = rows_of(tile, F, IS_GATED, BLOCK_M)
    bias = None
    if weights.bias is not None:
        bias = numerics.load(weights.bias + m)[:, None]
    y = products.product(
        weights,
        m,
        inputs,
        start,
        rows,
        D // SPLITS,
        NORM,
        BLOCK_N,
        BLOCK_E,
        STAGES,
        part,
        inputs_step,
        tl.program_id(2) if SPLITS > 1 else None,
    )
    if SPLITS > 1:
        place = tl.program_id(0) * tl.num_programs(1) + tile
        y, goes_on = splits.put_together(y, shared, place, SPLITS)
        does &= goes_on
    if bias is not None:
        y += bias
    store_activated(y, tile, n, does, out_ptr, F, IS_GATED)


@triton.jit
def _feed_kernel(
    inputs,
    inputs_step,
    weights,
    weights_step,
    runs_ptr,
    now_ptr,
    out_ptr,
    rows,
    shared,
    D: tl.constexpr,
    F: tl.constexpr,
    IS_GATED: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_LONG: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    part = None
    if PARTS == 2:
        tiles = tl.num_programs(1) // 2
        part = (tile // tiles).to(tl.int64)
        tile %= tiles
        out_ptr += part * rows * F
    if OVERLAP:
        overlap.wait()
    if now_ptr is not None:
        # Like the second block of a pair, but with distances read on the device.
        BITS: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth
        part = 1
        inputs_step = hops.norm_step(now_ptr, hops.FFN_GAIN, BITS)
        weights_step = hops.weights_step(now_ptr, hops.FEED, BITS)
    if part is not None:
        # Inlined: a function cannot return a tuple whose fields may be None.
        weights = products.Weights(
            weights.weight + part * weights_step.weight,
            weights.stride,
            None if weights.bias is None else weights.bias + part * weights_step.bias,
        )

    if runs_ptr is None and not IS_LONG:
        _feed_tile(
            tile,
            start,
            n,
            n < rows,
            part,
            inputs,
            inputs_step,
            weights,
            out_ptr,
            rows,
            shared,
            D,
            F,
            IS_GATED,
            NORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
            SPLITS,
        )
    else:
        TILES: tl.constexpr = tiles_of(F, IS_GATED, BLOCK_M)
        does = guards.flagged(runs_ptr, n, rows)
        begin = tl.where(guards.some(does), 0, TILES)
        for number in tl.range(
            begin + tile, TILES, tl.num_programs(1), disable_licm=not IS_LONG, flatten=IS_LONG
        ):
            _feed_tile(
                number,
                start,
                n,
                does,
                part,
                inputs,
                inputs_step,
                weights,
                out_ptr,
                rows,
                None,
                D,
                F,
                IS_GATED,
                NORM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
                1,
            )


def feed(
    h: Tensor,
    feeds: Sequence[Feed],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] | None = None,
    chosen: Chosen | None = None,
    now: Tensor | None = None,
    half: HalfNorm | None = None,
    arrivals: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Norm, first product and activation of an FFN, of one block or of the two of a pair.

    ``changes``: what each block adds to ``h`` before its norm, ``[n, D]`` each. ``chosen``: the
    rows that run; not with ``index``. ``now``: inside a loop (``hops``), the distances from the
    given tensors, those of its first layer, to those of the next layer. ``half``: the half norm of
    all rows, if already taken; only then may tiles be split, with ``arrivals`` (``splits``).
    Returns ``[n, F]`` each. A pair takes one launch if its blocks have the same shape and run for
    all rows.
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
    over = guards.TABLE if is_guarded else None if half is None else "feed_half"
    if half is None or rows <= splits.MOST_STREAMED:
        arrivals = None
    blocks, options = blocks_for("feed", config, h, rows, shape, over=over)
    is_apart = bool(blocks.pop("NORM_APART", False)) and now is None
    tiles = parts * triton.cdiv(shape[0], blocks["BLOCK_M"])
    programs = guards.width_of(blocks, rows, tiles, is_guarded=is_guarded)
    programs, is_long = share_out(blocks, tiles, programs, may_be_long=parts == 1)
    row_blocks = triton.cdiv(rows, blocks["BLOCK_N"])
    shared = splits.arguments_of(blocks, arrivals, row_blocks * tiles, [shape[1]], h.device)
    out = empty((parts, rows, width), h.dtype, h.device)
    norms = [each.norm for each in feeds]
    x = rows_read(h, norms, index=index, changes=changes, is_apart=is_apart, half=half)
    launch(
        _feed_kernel,
        splits.grid_of((row_blocks, programs), shared),
        options,
        is_guarded=is_guarded,
        inputs=x.first,
        inputs_step=x.step,
        weights=weights_of(linear),
        weights_step=weights_step([each.linear for each in feeds]),
        runs_ptr=None if chosen is None else chosen.runs,
        now_ptr=now,
        out_ptr=out,
        rows=rows,
        **shared,
        D=shape[1],
        F=width,
        IS_GATED=feeds[0].activation is Activation.GATED_SILU,
        PARTS=parts,
        NORM=x.form,
        IS_LONG=is_long,
        **blocks,
    )
    return list(out)


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing."""
    return product_candidates(rows, may_be_long=True)


def feed_half_candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """For rows of a half norm, with whole tiles and with split ones."""
    return half_candidates(rows) + splits.step_candidates(rows, (shape[0], shape[1]))


def _kind(part: Feed) -> Hashable:
    has_bias = part.linear.bias is not None
    return part.activation, part.width, has_bias, kind_of(part.norm, part.linear)
