"""Both first halves of a parallel block in one launch, for few rows.

    queries, entries = the heads of norm(h[index])             as in ``projection``
    out = the activated first product of norm(h[index])        as in ``feed``

Both read the same rows, so one kernel computes both: the first programs of the grid
``(n / BLOCK_N, tiles of heads + tiles of the FFN)`` own rows of the QKV weight, the others rows of
the FFN's. Layouts are those of the two files. Tuning table: ``project_append_feed``, shape
``(rows of both weights, D)``.

With flags (``guards``), separate ones for each half, tiles that no row needs are skipped. The grid
is then ``(n / BLOCK_N, PROGRAMS)``, and each program loops over tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, numerics, overlap, products
from fastskip.kernels.feed import feed, rows_of, store_activated, tiles_of
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    distance,
    kind_of,
    product_candidates,
    rows_read,
    weights_of,
)
from fastskip.kernels.projection import (
    angles_of,
    chosen_tiles,
    entries_of,
    head_arguments,
    head_rows,
    project_append,
    store_heads,
    turn,
)
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, Feed, Projection
from fastskip.ops.routes import Chosen


@triton.jit
def _whose(
    number,
    F: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Which tile of its own half tile ``number`` is, whether that half is the FFN, and the tile's
    weight rows ``[BLOCK_M]``."""
    HEAD_TILES: tl.constexpr = tl.cdiv((QUERIES + 2 * GROUPS) * HEAD_DIM, BLOCK_M)
    is_feed = number >= HEAD_TILES
    tile = number - tl.where(is_feed, HEAD_TILES, 0)
    head_m = head_rows(tile, QUERIES, GROUPS, HEAD_DIM, BLOCK_M)
    return tile, is_feed, tl.where(is_feed, rows_of(tile, F, IS_GATED, BLOCK_M), head_m)


@triton.jit
def _tile(
    number,
    start,
    n,
    asks,
    leaves,
    feeds,
    inputs,
    inputs_step,
    weights,
    weight_distance,
    feed_bias_ptr,
    heads,
    queries_ptr,
    out_ptr,
    rows,
    D: tl.constexpr,
    F: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of heads: queries of the rows ``asks [BLOCK_N]``, and entries of those rows of
    ``leaves`` (of all if ``None``) that have a slot; or a tile of the FFN, for the rows ``feeds``.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    TURNING: tl.constexpr = QUERIES + GROUPS
    # Kept through the product only if they take few registers.
    ANGLES_FIRST: tl.constexpr = BLOCK_M * BLOCK_N <= 1024
    tile, is_feed, m = _whose(number, F, QUERIES, GROUPS, HEAD_DIM, IS_GATED, BLOCK_M)
    part = is_feed.to(tl.int64)
    # Before the heads' loads rather than in ``product``, where it spills on sm_89.
    own_inputs = products.Inputs(
        inputs.x + part * inputs_step.x,
        inputs.stride,
        inputs.index,
        None if inputs.change is None else inputs.change + part * inputs_step.change,
        inputs.change_stride,
        None if inputs.gain is None else inputs.gain + part * inputs_step.gain,
        None if inputs.shift is None else inputs.shift + part * inputs_step.shift,
        inputs.epsilon,
    )
    own_weights = products.Weights(weights.weight + part * weight_distance, weights.stride)

    pair = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    # Loads for the heads are issued before the product, so that the latencies overlap; programs
    # of the FFN issue none.
    inside = n < tl.where(is_feed, 0, rows)
    if heads.cosine is not None:
        position = tl.load(heads.positions + n, mask=inside, other=0).to(tl.int64)
        if ANGLES_FIRST:
            cosine, sine = angles_of(pair, position, inside, heads, HALF, TURNING)
    entry_ptr = None
    is_kept = None
    if GROUPS > 0:
        own_leaves = inside if leaves is None else leaves & inside
        entry_ptr, is_kept = entries_of(n, own_leaves, heads, HEAD_DIM)
    # One loop for both halves: only the pointers differ.
    y = products.product(own_weights, m, own_inputs, start, rows, D, NORM, BLOCK_N, BLOCK_E, STAGES)
    if is_feed:
        if feed_bias_ptr is not None:
            y += numerics.load(feed_bias_ptr + m)[:, None]
        store_activated(y, tile, n, feeds, out_ptr, F, IS_GATED)
    else:
        if weights.bias is not None:
            y += numerics.load(weights.bias + m)[:, None]
        first, second = products.split_pairs(y)
        if heads.cosine is not None:
            if not ANGLES_FIRST:
                cosine, sine = angles_of(pair, position, inside, heads, HALF, TURNING)
            first, second = turn(first, second, pair, cosine, sine, HALF, TURNING)
        store_heads(
            first,
            second,
            pair,
            n,
            asks,
            queries_ptr,
            entry_ptr,
            is_kept,
            QUERIES,
            GROUPS,
            HEAD_DIM,
        )


@triton.jit
def _project_append_feed_kernel(
    inputs,
    inputs_step,
    weights,
    weight_distance,
    feed_bias_ptr,
    heads,
    runs_ptr,
    feed_runs_ptr,
    queries_ptr,
    out_ptr,
    rows,
    D: tl.constexpr,
    F: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEAVES_ALL: tl.constexpr,
    IS_GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    if OVERLAP:
        overlap.wait()
    if runs_ptr is None and feed_runs_ptr is None:
        _tile(
            tl.program_id(1),
            start,
            n,
            n < rows,
            None,
            n < rows,
            inputs,
            inputs_step,
            weights,
            weight_distance,
            feed_bias_ptr,
            heads,
            queries_ptr,
            out_ptr,
            rows,
            D,
            F,
            QUERIES,
            GROUPS,
            HEAD_DIM,
            IS_GATED,
            NORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
        )
    else:
        # Tiles of heads end where those of the FFN begin, so the tiles needed form one range.
        begin, middle, asks, leaves = chosen_tiles(
            runs_ptr, n, rows, QUERIES, GROUPS, HEAD_DIM, LEAVES_ALL, BLOCK_M
        )
        feeds = guards.flagged(feed_runs_ptr, n, rows)
        end = middle + tl.where(guards.some(feeds), tiles_of(F, IS_GATED, BLOCK_M), 0)
        for number in tl.range(
            begin + tl.program_id(1), end, tl.num_programs(1), disable_licm=True
        ):
            _tile(
                number,
                start,
                n,
                asks,
                leaves,
                feeds,
                inputs,
                inputs_step,
                weights,
                weight_distance,
                feed_bias_ptr,
                heads,
                queries_ptr,
                out_ptr,
                rows,
                D,
                F,
                QUERIES,
                GROUPS,
                HEAD_DIM,
                IS_GATED,
                NORM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
            )


def project_append_feed(
    h: Tensor,
    projection: Projection,
    part: Feed,
    *,
    index: Tensor | None = None,
    chosen: tuple[Chosen | None, Chosen | None] = (None, None),
    config: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Both first halves of a parallel block: queries ``[n, H, K]`` and ``[n, F]``.

    ``chosen``: the rows that attend, and those that run the FFN; not with ``index``. One launch if
    both norms are of one kind, as they are where the halves share their norm.
    """
    refuse_gradients(h=h)
    runs, feed_runs = (None if each is None else each.runs for each in chosen)
    if kind_of(projection.norm, projection.linear) != kind_of(part.norm, part.linear):
        queries = project_append(h, [projection], index=index, chosen=chosen[0], config=config)[0]
        return queries, feed(h, [part], index=index, chosen=chosen[1], config=config)[0]
    weights = [projection.linear.weight, part.linear.weight]
    rows, width = len(h) if index is None else len(index), part.width
    shape = (sum(len(weight) for weight in weights), weights[0].shape[1])
    is_guarded = runs is not None or feed_runs is not None
    over = guards.TABLE if is_guarded else None
    blocks, options = blocks_for("project_append_feed", config, h, rows, shape, over=over)
    is_apart = bool(blocks.pop("NORM_APART", False))
    queries = empty((rows, projection.heads, projection.head_dim), h.dtype, h.device)
    out = empty((rows, width), h.dtype, h.device)
    tiles = sum(triton.cdiv(len(weight), blocks["BLOCK_M"]) for weight in weights)
    programs = guards.width_of(blocks, rows, tiles, is_guarded=is_guarded)
    x = rows_read(h, [projection.norm, part.norm], index=index, is_apart=is_apart)
    launch(
        _project_append_feed_kernel,
        (triton.cdiv(rows, blocks["BLOCK_N"]), programs),
        options,
        is_guarded=is_guarded,
        inputs=x.first,
        inputs_step=x.step,
        weights=weights_of(projection.linear),
        weight_distance=distance(weights),
        feed_bias_ptr=part.linear.bias,
        **head_arguments(projection),
        runs_ptr=runs,
        feed_runs_ptr=feed_runs,
        queries_ptr=queries,
        out_ptr=out,
        rows=rows,
        D=shape[1],
        F=width,
        IS_GATED=part.activation is Activation.GATED_SILU,
        LEAVES_ALL=runs is None or projection.leaves_all,
        NORM=x.form,
        **blocks,
    )
    return queries, out


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing."""
    return product_candidates(rows)
