"""Norm, QKV product, RoPE and the append to the cache, in one launch, for few rows.

    y = norm(h[index]) @ weight.T + bias                       heads [n, H + 2G, K]
    queries, keys: element i of a head turns with element i + K/2; values stay as they are

``h [N, D]``, ``weight [(H + 2G) * K, D]``, ``cosine``, ``sine [positions, K / 2]``; the queries go
to ``out [n, H, K]``, keys and values to their slots: head ``e`` of the ``2G`` at
``table[sequence, slot // PAGE] + offset + (e * PAGE + slot % PAGE) * K``. A row whose slot is
negative leaves no entry.

A program owns ``BLOCK_M / 2`` pairs ``(i, i + K/2)``, counted through all heads, so that any head
dim fits any block. Grid ``(n / BLOCK_N, parts * pairs / (BLOCK_M / 2))``, where a pair of blocks
makes two parts; programs that share weights are neighbours, so that all but one find them in the
L2 cache. Tables: kernel ``project_append``, shape ``((H + 2G) * K, D)``.

With flags (``guards``) there are queries of the rows that run, and entries of these or of all rows;
tiles that no row needs are left out. Grid then ``(n / BLOCK_N, PROGRAMS)``, tile after tile.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, numerics, overlap, products
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    distance,
    kind_of,
    product_candidates,
    rows_read,
)
from fastskip.kernels.rotary import rotate
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE as PAGE_SLOTS
from fastskip.ops.contracts import Projection
from fastskip.ops.routes import Chosen


@triton.jit
def head_rows(
    tile,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Weight rows ``[BLOCK_M]`` of a tile of heads, within the weight."""
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = (QUERIES + 2 * GROUPS) * HALF
    pair = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    return products.pair_rows(tl.minimum(pair, PAIRS - 1), HALF, HALF)


@triton.jit
def entries_of(
    n,
    leaves,
    anchor_ptr,
    table_ptr,
    sequences_ptr,
    slots_ptr,
    stride_tb,
    offset,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Where the entry of each row ``n`` begins, as pointers, and which rows leave one.

    ``leaves [N]``: rows that leave one if they have a slot.
    """
    slot = tl.load(slots_ptr + n, mask=leaves, other=-1)
    is_kept = slot >= 0
    sequence = tl.load(sequences_ptr + n, mask=is_kept, other=0).to(tl.int64)
    page = table_ptr + sequence * stride_tb + slot // PAGE
    start = tl.load(page, mask=is_kept, other=0)
    return anchor_ptr + start + offset + slot % PAGE * HEAD_DIM, is_kept


@triton.jit
def angles_of(
    pair,
    position,
    inside,
    cosine_ptr,
    sine_ptr,
    stride_p,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Cosines and sines of pairs ``[P]``, of rows where ``inside [N]``: ``[P, N]``.

    Only ``HEADS`` turn.
    """
    angle = position[None, :] * stride_p + (pair % HALF)[:, None]
    is_read = (pair < HEADS * HALF)[:, None] & inside[None, :]
    return numerics.load(cosine_ptr + angle, is_read), numerics.load(sine_ptr + angle, is_read)


@triton.jit
def turn(first, second, pair, cosine, sine, HALF: tl.constexpr, HEADS: tl.constexpr):
    """RoPE of pairs ``[P, N]``; heads from ``HEADS`` on stay as they are."""
    does_turn = (pair < HEADS * HALF)[:, None]
    turned_first, turned_second = rotate(first, second, cosine, sine)
    return tl.where(does_turn, turned_first, first), tl.where(does_turn, turned_second, second)


@triton.jit
def store_heads(
    first,
    second,
    pair,
    n,
    asks,
    out_ptr,
    entry_ptr,
    is_kept,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Queries to ``out [n, H, K]``, keys and values to the entries that begin at ``entry_ptr``.

    ``asks``, ``is_kept [N]``: the rows that have queries, and those that leave entries.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    head = pair // HALF
    element = pair % HALF
    if QUERIES > 0:
        query_ptr = out_ptr + n.to(tl.int64) * (QUERIES * HEAD_DIM)
        query_ptr = query_ptr[None, :] + (head * HEAD_DIM + element)[:, None]
        is_written = (head < QUERIES)[:, None] & asks[None, :]
        numerics.store(query_ptr, first, is_written)
        numerics.store(query_ptr + HALF, second, is_written)
    if GROUPS > 0:
        entry_ptr = entry_ptr[None, :] + ((head - QUERIES) * (PAGE * HEAD_DIM) + element)[:, None]
        is_entry = (head >= QUERIES) & (head < QUERIES + 2 * GROUPS)
        is_written = is_entry[:, None] & is_kept[None, :]
        numerics.store(entry_ptr, first, is_written)
        numerics.store(entry_ptr + HALF, second, is_written)


@triton.jit
def chosen_tiles(
    runs_ptr,
    n,
    rows,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEAVES_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The tiles of heads that rows ``n [N]`` need, first and end, and which rows need them.

    Tiles of queries come first. Of the rows those that run have queries; where not all leave
    entries, they alone do.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    TILES: tl.constexpr = tl.cdiv((QUERIES + 2 * GROUPS) * HALF, BLOCK_M // 2)
    IDLE: tl.constexpr = QUERIES * HALF // (BLOCK_M // 2) if LEAVES_ALL and GROUPS > 0 else TILES
    asks = guards.flagged(runs_ptr, n, rows)
    begin = tl.where(guards.some(asks), 0, IDLE)
    return begin, TILES, asks, n < rows if LEAVES_ALL else asks


@triton.jit
def _project_tile(
    tile,
    start,
    n,
    asks,
    leaves,
    x_ptr,
    index_ptr,
    change_ptr,
    gain_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    cosine_ptr,
    sine_ptr,
    positions_ptr,
    anchor_ptr,
    table_ptr,
    sequences_ptr,
    slots_ptr,
    out_ptr,
    stride_xn,
    stride_cn,
    stride_wm,
    stride_p,
    stride_tb,
    offset,
    epsilon,
    rows,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The heads of ``BLOCK_M / 2`` pairs: queries of the rows ``asks [BLOCK_N]``, and entries of
    the rows ``leaves``, in so far as they have a slot."""
    HALF: tl.constexpr = HEAD_DIM // 2
    FORM: tl.constexpr = products.STREAM if BLOCK_N < 16 else products.TENSOR
    # Held through the product only if they are few registers.
    ANGLES_FIRST: tl.constexpr = BLOCK_M * BLOCK_N <= 1024
    pair = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    m = head_rows(tile, QUERIES, GROUPS, HEAD_DIM, BLOCK_M)
    inside = n < rows
    # What the end needs is asked for before the product, so that the latencies overlap.
    if bias_ptr is not None:
        bias = numerics.load(bias_ptr + m)
    if cosine_ptr is not None:
        position = tl.load(positions_ptr + n, mask=inside, other=0).to(tl.int64)
        if ANGLES_FIRST:
            cosine, sine = angles_of(
                pair,
                position,
                inside,
                cosine_ptr,
                sine_ptr,
                stride_p,
                HALF,
                QUERIES + GROUPS,
            )
    entry_ptr = None
    is_kept = None
    if GROUPS > 0:
        entry_ptr, is_kept = entries_of(
            n,
            leaves,
            anchor_ptr,
            table_ptr,
            sequences_ptr,
            slots_ptr,
            stride_tb,
            offset,
            HEAD_DIM,
            PAGE,
        )
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
    first, second = products.split_pairs(y)
    if cosine_ptr is not None:
        if not ANGLES_FIRST:
            cosine, sine = angles_of(
                pair,
                position,
                inside,
                cosine_ptr,
                sine_ptr,
                stride_p,
                HALF,
                QUERIES + GROUPS,
            )
        first, second = turn(first, second, pair, cosine, sine, HALF, QUERIES + GROUPS)
    store_heads(
        first,
        second,
        pair,
        n,
        asks,
        out_ptr,
        entry_ptr,
        is_kept,
        QUERIES,
        GROUPS,
        HEAD_DIM,
        PAGE,
    )


@triton.jit
def _project_append_kernel(
    x_ptr,
    index_ptr,
    change_ptr,
    gain_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    cosine_ptr,
    sine_ptr,
    positions_ptr,
    anchor_ptr,
    table_ptr,
    sequences_ptr,
    slots_ptr,
    runs_ptr,
    out_ptr,
    stride_xn,
    stride_cn,
    stride_wm,
    stride_p,
    stride_tb,
    offset,
    x_distance,
    change_distance,
    gain_distance,
    shift_distance,
    weight_distance,
    bias_distance,
    cosine_distance,
    sine_distance,
    positions_distance,
    anchor_distance,
    table_distance,
    sequences_distance,
    slots_distance,
    offset_distance,
    epsilon,
    rows,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    LEAVES_ALL: tl.constexpr,
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
        out_ptr += part * rows * (QUERIES * HEAD_DIM)
        if change_ptr is not None:
            change_ptr += part * change_distance
        if gain_ptr is not None:
            gain_ptr += part * gain_distance
        if shift_ptr is not None:
            shift_ptr += part * shift_distance
        if bias_ptr is not None:
            bias_ptr += part * bias_distance
        if cosine_ptr is not None:
            cosine_ptr += part * cosine_distance
            sine_ptr += part * sine_distance
            positions_ptr += part * positions_distance
        if GROUPS > 0:
            anchor_ptr += part * anchor_distance
            table_ptr += part * table_distance
            sequences_ptr += part * sequences_distance
            slots_ptr += part * slots_distance
            offset += part * offset_distance
    if OVERLAP is not None:
        m = head_rows(tile, QUERIES, GROUPS, HEAD_DIM, BLOCK_M)
        overlap.begin_with(weight_ptr, stride_wm, m, D, OVERLAP)

    if runs_ptr is None:
        _project_tile(
            tile,
            start,
            n,
            n < rows,
            n < rows,
            x_ptr,
            index_ptr,
            change_ptr,
            gain_ptr,
            shift_ptr,
            weight_ptr,
            bias_ptr,
            cosine_ptr,
            sine_ptr,
            positions_ptr,
            anchor_ptr,
            table_ptr,
            sequences_ptr,
            slots_ptr,
            out_ptr,
            stride_xn,
            stride_cn,
            stride_wm,
            stride_p,
            stride_tb,
            offset,
            epsilon,
            rows,
            D,
            QUERIES,
            GROUPS,
            HEAD_DIM,
            PAGE,
            NORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
        )
    else:
        begin, end, asks, leaves = chosen_tiles(
            runs_ptr, n, rows, QUERIES, GROUPS, HEAD_DIM, LEAVES_ALL, BLOCK_M
        )
        for number in tl.range(begin + tile, end, tl.num_programs(1), disable_licm=True):
            _project_tile(
                number,
                start,
                n,
                asks,
                leaves,
                x_ptr,
                index_ptr,
                change_ptr,
                gain_ptr,
                shift_ptr,
                weight_ptr,
                bias_ptr,
                cosine_ptr,
                sine_ptr,
                positions_ptr,
                anchor_ptr,
                table_ptr,
                sequences_ptr,
                slots_ptr,
                out_ptr,
                stride_xn,
                stride_cn,
                stride_wm,
                stride_p,
                stride_tb,
                offset,
                epsilon,
                rows,
                D,
                QUERIES,
                GROUPS,
                HEAD_DIM,
                PAGE,
                NORM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
            )


def project_append(
    h: Tensor,
    projections: Sequence[Projection],
    *,
    index: Tensor | None = None,
    chosen: Chosen | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Norm, product, RoPE and K/V append, of one block or of the two blocks of a pair.

    Returns the rotated queries of each, ``[n, H, K]`` (``H`` may be 0). A pair takes one launch if
    its blocks are of one shape and run for all rows. ``chosen``: the rows that run, without
    ``index``; the others leave entries if the projection ``leaves_all``.
    """
    refuse_gradients(h=h)
    first, last = projections[0], projections[-1]
    if len(projections) > 1 and (chosen is not None or _kind(first) != _kind(last)):
        return [
            found
            for each in projections
            for found in project_append(h, [each], index=index, chosen=chosen, config=config)
        ]
    rows, parts = len(h) if index is None else len(index), len(projections)
    linear, size, queries = first.linear, first.head_dim, first.heads
    shape = (linear.weight.shape[0], linear.weight.shape[1])
    is_guarded = chosen is not None
    if is_guarded:
        config = guards.config_of("project_append", config, h.device, rows, shape)
    blocks, options = blocks_for("project_append", config, h, rows, shape)
    is_apart = bool(blocks.pop("NORM_APART", False))
    out = empty((parts, rows, queries, size), h.dtype, h.device)
    tiles = parts * triton.cdiv(shape[0] // 2, blocks["BLOCK_M"] // 2)
    width = guards.width_of(blocks, rows, tiles, is_guarded=is_guarded)
    x = rows_read(h, [each.norm for each in projections], index=index, is_apart=is_apart)
    launch(
        _project_append_kernel,
        (triton.cdiv(rows, blocks["BLOCK_N"]), width),
        options,
        is_guarded=is_guarded,
        **x.arguments,
        **head_arguments(first),
        **_distances(first, last),
        weight_ptr=linear.weight,
        bias_ptr=linear.bias,
        runs_ptr=None if chosen is None else chosen.runs,
        out_ptr=out,
        stride_wm=linear.weight.stride(0),
        weight_distance=distance([each.linear.weight for each in projections]),
        bias_distance=distance([each.linear.bias for each in projections]),
        rows=rows,
        D=shape[1],
        PARTS=parts,
        LEAVES_ALL=chosen is None or first.leaves_all,
        **blocks,
    )
    return list(out)


def head_arguments(projection: Projection) -> dict[str, Any]:
    """The arguments of a kernel that say where heads go, and how they turn."""
    targets, pages, rotation = projection.targets, projection.pages, projection.rotation
    return {
        "cosine_ptr": None if rotation is None else rotation.cosine,
        "sine_ptr": None if rotation is None else rotation.sine,
        "positions_ptr": None if rotation is None else targets.positions,
        "anchor_ptr": None if pages is None else pages.anchor,
        "table_ptr": None if pages is None else pages.table,
        "sequences_ptr": None if pages is None else targets.sequences,
        "slots_ptr": None if pages is None else targets.slots,
        "stride_p": 0 if rotation is None else rotation.cosine.stride(0),
        "stride_tb": 0 if pages is None else pages.table.stride(0),
        "offset": 0 if pages is None else pages.offset,
        "QUERIES": projection.heads,
        "GROUPS": 0 if pages is None else pages.groups,
        "HEAD_DIM": projection.head_dim,
        "PAGE": PAGE_SLOTS,
    }


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing."""
    return product_candidates(rows)


def _distances(first: Projection, last: Projection) -> dict[str, int]:
    """Elements from what ``head_arguments`` names of one projection to the same of the other."""
    one, other = head_arguments(first), head_arguments(last)
    found = {
        name.replace("_ptr", "_distance"): distance([tensor, other[name]])
        for name, tensor in one.items()
        if name.endswith("_ptr")
    }
    return {**found, "offset_distance": other["offset"] - one["offset"]}


def _kind(projection: Projection) -> Hashable:
    arguments = head_arguments(projection)
    given = tuple(value is None for name, value in arguments.items() if name.endswith("_ptr"))
    sizes = tuple(value for name, value in arguments.items() if name.isupper() or "stride" in name)
    has_bias = projection.linear.bias is not None
    return given, sizes, has_bias, kind_of(projection.norm, projection.linear)
