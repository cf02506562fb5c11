"""Prefill attention: many query rows, each over the first entries of its sequence.

    out[r, h] = sum_s softmax_s(scale * q[r, h] . k[b, s, h // ratio]) * v[b, s, h // ratio]

with ``s`` below ``limits[r]``; ``b`` is the sequence of row ``r``. A row without entries yields 0
(in the torch form only if no row of its sequence has any, else NaN). Queries ``[n, H, K]``, out
``[n, H * K]``, both in query order. Grid ``(tiles, H)``: a tile is up to ``BLOCK_Q`` rows of one
sequence, as ``order`` lists them, so that packed sequences need no padding, whichever of their rows
are present. Where sequences begin is read on the device, so that a captured launch serves other
lengths; there are as many tiles as ``n`` rows of ``B`` sequences can need, and those without rows
exit at once. Limits ascend in a tile: up to the smallest no score is masked, and past the largest
nothing is read. Where flags ``runs [n]`` say which rows attend, the limits of the others do not
count, and a tile without rows that attend exits too.

Tuning table: ``attend_rows``, rows are ``n``, shape ``(H, G, K)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, numerics, tuning
from fastskip.kernels.blocks import columns_of, split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.softmax import LOG2_E, LOW, attend_many
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE as PAGE_SLOTS
from fastskip.ops.contracts import Pages, Reach


@triton.jit
def tile_of(tile, bounds_ptr, sequences, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr):
    """A tile's sequence, and where its rows begin and end in the order; no rows past the last tile.

    Later rows of a sequence reach further; their tiles come first, so that none of them runs alone
    at the end.
    """
    member = tl.arange(0, BLOCK_B)
    is_member = member < sequences
    begin = tl.load(bounds_ptr + member, mask=is_member, other=0)
    end = tl.load(bounds_ptr + member + 1, mask=is_member, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_Q)
    sequence = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    sequence = tl.minimum(sequence, sequences - 1)
    after = tl.sum(tl.where(member <= sequence, tiles, 0)) - 1 - tile
    is_own = member == sequence
    first = tl.sum(tl.where(is_own, begin, 0)) + after * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, tl.sum(tl.where(is_own, end, 0)))
    return sequence, first, tl.where(after >= 0, last, first)


@triton.jit
def _attend_rows_kernel(
    q_ptr,
    bounds_ptr,
    order_ptr,
    limits_ptr,
    runs_ptr,
    anchor_ptr,
    table_ptr,
    out_ptr,
    stride_qn,
    stride_qh,
    stride_tb,
    offset,
    factor,
    sequences,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    head = tl.program_id(1)
    sequence, first, last = tile_of(tl.program_id(0), bounds_ptr, sequences, BLOCK_Q, BLOCK_B)
    if first >= last:
        return
    number = first + tl.arange(0, BLOCK_Q)
    is_row = number < last
    row = tl.load(order_ptr + number, mask=is_row, other=0).to(tl.int64)
    if runs_ptr is not None:
        is_row = tl.load(runs_ptr + row, mask=is_row, other=0) != 0
        if not guards.some(is_row):
            return
    limit = tl.load(limits_ptr + row, mask=is_row, other=0)
    most = tl.max(limit, 0)
    least = tl.min(tl.where(is_row, limit, most), 0)

    column = tl.arange(0, BLOCK_K)
    mask = is_row[:, None] & (column < HEAD_DIM)[None]
    q_ptr += head * stride_qh
    q = tl.load(q_ptr + row[:, None] * stride_qn + column[None], mask=mask, other=0.0)
    entries_ptr = anchor_ptr + offset + head // (HEADS // GROUPS) * PAGE * HEAD_DIM
    table_ptr += sequence.to(tl.int64) * stride_tb
    out = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    best = tl.full([BLOCK_Q], LOW, tl.float32)
    whole = least // BLOCK_S * BLOCK_S
    for IS_MASKED in tl.static_range(2):
        out, total, best = attend_many(
            q,
            entries_ptr,
            table_ptr,
            whole if IS_MASKED else 0,
            most if IS_MASKED else whole,
            BLOCK_S,
            limit,
            out,
            total,
            best,
            factor,
            IS_MASKED,
            HEAD_DIM,
            PAGE,
            GROUPS * PAGE * HEAD_DIM,
            BLOCK_Q,
            BLOCK_S,
            BLOCK_K,
            STAGES,
        )
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    out_ptr += head * HEAD_DIM
    numerics.store(out_ptr + row[:, None] * (HEADS * HEAD_DIM) + column[None], out, mask)


def attend_rows(
    queries: Tensor,
    reach: Reach,
    pages: Pages,
    scale: float,
    *,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """Softmax attention of ``queries [n, H, K]``, each over the entries it reaches.

    Returns ``[n, H * K]`` in query order; rows that ``reach.runs`` excludes, and those of no
    sequence, are not written.
    """
    refuse_gradients(queries=queries)
    assert queries.stride(2) == 1 and pages.table.stride(1) == 1
    rows, heads, width = queries.shape
    shape = (heads, pages.groups, width)
    chosen = config or tuning.config_for("attend_rows", queries.device, rows, shape)
    blocks, options = split(chosen)
    if queries.element_size() > 2:
        # Full-precision products keep their operands in registers.
        blocks |= {"BLOCK_Q": 16, "BLOCK_S": 16}
        options |= {"num_warps": 8}
    sequences, block = reach.bounds.sequences, blocks["BLOCK_Q"]
    # Each sequence may end in a tile of a single row.
    tiles = (rows + min(rows, sequences) * (block - 1)) // block
    out = empty((rows, heads * width), queries.dtype, queries.device)
    launch(
        _attend_rows_kernel,
        (tiles, heads),
        options,
        is_guarded=reach.runs is not None,
        q_ptr=queries,
        bounds_ptr=reach.bounds.device,
        order_ptr=reach.order,
        limits_ptr=reach.limits,
        runs_ptr=reach.runs,
        anchor_ptr=pages.anchor,
        table_ptr=pages.table,
        out_ptr=out,
        stride_qn=queries.stride(0),
        stride_qh=queries.stride(1),
        stride_tb=pages.table.stride(0),
        offset=pages.offset,
        factor=scale * LOG2_E,
        sequences=sequences,
        HEADS=heads,
        GROUPS=pages.groups,
        HEAD_DIM=width,
        PAGE=PAGE_SLOTS,
        BLOCK_K=columns_of(width),
        BLOCK_B=triton.next_power_of_2(max(1, sequences)),
        **blocks,
    )
    return out


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing; few rows use small tiles, so that there are enough of them.

    Loads go through the page table, so it takes two more stages to have one more block in flight.
    """
    few = rows * shape[0] <= 64 * 256
    return [
        {"BLOCK_Q": queries, "BLOCK_S": block, "STAGES": stages, "num_warps": warps}
        for queries, warps in (((16, 4), (32, 4), (64, 4)) if few else ((64, 4), (128, 8)))
        for block in (32, 64)
        for stages in (2, 3, 5)
    ]
