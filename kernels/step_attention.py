"""Attention of a decode step: one query per sequence over all of its entries, split over keys.

    out[b, h] = sum_s softmax_s(scale * q[b, h] . k[b, s, h // ratio]) * v[b, s, h // ratio]

with ``s`` below ``counts[b] + extra``, a number on the device. Queries ``[B, H, K]``, out
``[B, H * K]``; without entries the output is 0. Grid ``(B * G * CHUNKS, SPLITS, parts)``: a program
takes every ``SPLITS``-th block of ``BLOCK_S`` slots, for (up to ``BLOCK_H``) query heads that share
a KV head. The launch width is thus fixed on the host, and the work follows the counts on the
device. Programs of a sequence whose flag in ``runs [B]`` is 0 exit at once, and its output is not
written.

Each split yields its normalised output and ``log2(sum of exp2(scores))``, in fp32. They are
combined in the order of the splits, so results do not depend on which finishes first: by the last
program of a head to arrive (``FUSED_COMBINE``), or by a second launch, grid ``(parts * B * H,)``.

Multi-head (one query head per group): no matrix instructions; every row of a tile keeps its own
softmax, so that warps synchronise only once, at the end. Grouped: the query heads of a group are
the rows of a ``tl.dot``, padded to 16.

Tuning table: ``attend_step``, rows are sequences (of both blocks of a pair), shape ``(H, G, K)``.
``PROGRAMS`` is the target launch width.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import hops, numerics, overlap, tuning
from fastskip.kernels.arrivals import is_last
from fastskip.kernels.blocks import columns_of, split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import distance
from fastskip.kernels.softmax import LOG2_E, LOW, attend_many, attend_one
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE as PAGE_SLOTS
from fastskip.ops.contracts import Pages, StepReach

MOST_SPLITS = 32


@triton.jit
def _combine(
    found_ptr,
    sums_ptr,
    out_ptr,
    head,
    is_head,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[head]`` from the results of the splits; all loads are independent of each other."""
    column = tl.arange(0, BLOCK_K)
    mask = is_head[:, None] & (column < HEAD_DIM)[None]
    best = tl.full([BLOCK_H], LOW, tl.float32)
    # Written by other multiprocessors during this launch: bypass the L1 cache.
    for part in tl.static_range(SPLITS):
        here = sums_ptr + head * SPLITS + part
        best = tl.maximum(best, tl.load(here, mask=is_head, other=LOW, cache_modifier=".cg"))
    total = tl.zeros([BLOCK_H], tl.float32)
    out = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    for part in tl.static_range(SPLITS):
        row = head * SPLITS + part
        found_sum = tl.load(sums_ptr + row, mask=is_head, other=LOW, cache_modifier=".cg")
        place = row[:, None] * HEAD_DIM + column[None]
        found = tl.load(found_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
        weight = tl.exp2(found_sum - best)
        total += weight
        out += weight[:, None] * found
    place = head[:, None] * HEAD_DIM + column[None]
    numerics.store(out_ptr + place, out / total[:, None], mask)


@triton.jit
def _attend_step_kernel(
    q_ptr,
    anchor_ptr,
    table_ptr,
    counts_ptr,
    runs_ptr,
    now_ptr,
    arrivals_ptr,
    found_ptr,
    sums_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    stride_tb,
    q_distance,
    anchor_distance,
    table_distance,
    counts_distance,
    arrivals_distance,
    offset,
    offset_distance,
    extra,
    extra_distance,
    rows,
    factor,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FUSED_COMBINE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    READS_AHEAD: tl.constexpr,
):
    # In a loop, the address of the counts must itself be read first.
    AHEAD: tl.constexpr = READS_AHEAD and now_ptr is None
    if OVERLAP and not AHEAD:
        overlap.wait()
    lane, part, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    sequence = (lane // (GROUPS * CHUNKS)).to(tl.int64)
    table_ptr += problem * table_distance + sequence * stride_tb
    counts_ptr += problem * counts_distance + sequence
    if runs_ptr is not None:
        does_run = overlap.read(runs_ptr + sequence, sequence >= 0, AHEAD)
    if AHEAD:
        # The launch that produced the queries has read the same flags; counts are fixed during a
        # step, and pages during a call.
        count = overlap.read(counts_ptr, sequence >= 0, AHEAD)
        overlap.touch(table_ptr + tl.minimum(part * BLOCK_S // PAGE, stride_tb - 1))
        overlap.wait()
    # All programs of a sequence read the same flag, so either all of its splits arrive or none.
    if runs_ptr is not None and does_run == 0:
        return
    if now_ptr is not None:
        table_ptr += tl.load(now_ptr + hops.TABLE)
        counts_ptr += tl.load(now_ptr + hops.COUNTS)
        BITS: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth
        anchor_ptr += hops.distance(now_ptr, hops.OFFSET, BITS)
    group = lane // CHUNKS % GROUPS
    first = lane % CHUNKS * BLOCK_H
    if not AHEAD:
        count = tl.load(counts_ptr)
    count += extra + problem.to(tl.int32) * extra_distance

    head = group * RATIO + first
    q_ptr += problem * q_distance + sequence * stride_qb + head.to(tl.int64) * stride_qh
    entries_ptr = anchor_ptr + problem * anchor_distance + offset + problem * offset_distance
    entries_ptr += group * PAGE * HEAD_DIM
    is_head = first + tl.arange(0, BLOCK_H) < RATIO
    column = tl.arange(0, BLOCK_K)
    is_column = column < HEAD_DIM
    plane: tl.constexpr = GROUPS * PAGE * HEAD_DIM
    if RATIO == 1:
        out, total, best = attend_one(
            numerics.load(q_ptr + column, is_column) * factor,
            entries_ptr,
            table_ptr,
            part * BLOCK_S,
            count,
            SPLITS * BLOCK_S,
            HEAD_DIM,
            PAGE,
            plane,
            BLOCK_S,
            BLOCK_K,
            STAGES,
        )
    else:
        q_ptr += tl.arange(0, BLOCK_H)[:, None] * stride_qh + column[None]
        out, total, best = attend_many(
            tl.load(q_ptr, mask=is_head[:, None] & is_column[None], other=0.0),
            entries_ptr,
            table_ptr,
            part * BLOCK_S,
            count,
            SPLITS * BLOCK_S,
            tl.zeros([BLOCK_H], tl.int32) + count,
            tl.zeros([BLOCK_H, BLOCK_K], tl.float32),
            tl.zeros([BLOCK_H], tl.float32),
            tl.full([BLOCK_H], LOW, tl.float32),
            factor,
            True,
            HEAD_DIM,
            PAGE,
            plane,
            BLOCK_H,
            BLOCK_S,
            BLOCK_K,
            STAGES,
        )
    # Without entries, in all or in this split: 0, which gets no weight.
    some = tl.where(total > 0.0, total, 1.0)
    out = out / some[:, None]

    # Each head's row in everything that is written.
    row = (problem * rows + sequence) * (GROUPS * RATIO) + head + tl.arange(0, BLOCK_H)
    mask = is_head[:, None] & is_column[None]
    if SPLITS == 1:
        numerics.store(out_ptr + row[:, None] * HEAD_DIM + column[None], out, mask)
    else:
        place = row * SPLITS + part
        tl.store(found_ptr + place[:, None] * HEAD_DIM + column[None], out, mask=mask)
        log_sum = tl.where(total > 0.0, best + tl.log2(some), LOW)
        tl.store(sums_ptr + place, log_sum, mask=is_head)
        if FUSED_COMBINE:
            does_combine = is_last(arrivals_ptr + problem * arrivals_distance + lane, SPLITS)
            if does_combine:
                _combine(
                    found_ptr, sums_ptr, out_ptr, row, is_head, SPLITS, HEAD_DIM, BLOCK_H, BLOCK_K
                )


@triton.jit
def _attend_step_combine_kernel(
    runs_ptr,
    found_ptr,
    sums_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    if runs_ptr is not None and tl.load(runs_ptr + tl.program_id(0) // HEADS) == 0:
        return
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    _combine(found_ptr, sums_ptr, out_ptr, row, row >= 0, SPLITS, HEAD_DIM, 1, BLOCK_K)


def attend_step(
    queries: Sequence[Tensor],
    reach: Sequence[StepReach],
    pages: Sequence[Pages],
    scale: float,
    *,
    now: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """One query per sequence over all of its entries, of one block or of the two of a pair.

    ``[B, H, K]`` each -> ``[B, H * K]`` each. Two blocks need separate ``arrivals``. Blocks that
    differ in their sizes, or run for chosen sequences, take one launch each. ``now``: inside a loop
    (``hops``), the distances from the given tensors, those of its first layer, to those of the next
    layer.
    """
    refuse_gradients(**{f"queries[{number}]": each for number, each in enumerate(queries)})
    kinds = {_kind_of(*each) for each in zip(queries, pages, strict=True)}
    is_guarded = any(each.runs is not None for each in reach)
    if len(kinds) > 1 or (len(queries) > 1 and is_guarded):
        each = zip(queries, reach, pages, strict=True)
        return [attend_step([q], [r], [p], scale, config=config)[0] for q, r, p in each]
    q, own, entries = queries[0], reach[0], pages[0]
    assert q.stride(2) == 1 and entries.table.stride(1) == 1
    rows, heads, width = q.shape
    parts, ratio = len(queries), heads // entries.groups
    shape = (heads, entries.groups, width)
    chosen = config or tuning.config_for("attend_step", q.device, rows * parts, shape)
    blocks, options = split(chosen)
    if now is not None and options["num_warps"] <= 4:
        # A loop keeps addresses in registers, which ptxas would otherwise spill; four programs per
        # multiprocessor have room for them.
        options.setdefault("maxnreg", 128)
    block_h = 1 if ratio == 1 else min(64, max(16, triton.next_power_of_2(ratio)))
    lanes = rows * entries.groups * triton.cdiv(ratio, block_h)
    splits = splits_of(lanes * parts, max(each.most for each in reach) // max(rows, 1), blocks)
    del blocks["PROGRAMS"]

    out = empty((parts, rows, heads * width), q.dtype, q.device)
    found = sums = out
    if splits > 1:
        found = empty((parts * rows * heads, splits, width), torch.float32, q.device)
        sums = empty((parts * rows * heads, splits), torch.float32, q.device)
    written: dict[str, Any] = {"found_ptr": found, "sums_ptr": sums, "out_ptr": out}
    sizes = {
        "SPLITS": splits,
        "HEAD_DIM": width,
        "BLOCK_K": columns_of(width),
    }
    launch(
        _attend_step_kernel,
        (lanes, splits, parts),
        options,
        is_guarded=is_guarded,
        q_ptr=q,
        anchor_ptr=entries.anchor,
        table_ptr=entries.table,
        counts_ptr=own.counts,
        runs_ptr=own.runs,
        now_ptr=now,
        arrivals_ptr=own.arrivals,
        **written,
        stride_qb=q.stride(0),
        stride_qh=q.stride(1),
        stride_tb=entries.table.stride(0),
        q_distance=distance(queries),
        anchor_distance=distance([each.anchor for each in pages]),
        table_distance=distance([each.table for each in pages]),
        counts_distance=distance([each.counts for each in reach]),
        arrivals_distance=distance([each.arrivals for each in reach]),
        offset=entries.offset,
        offset_distance=pages[-1].offset - entries.offset,
        extra=own.extra,
        extra_distance=reach[-1].extra - own.extra,
        rows=rows,
        factor=scale * LOG2_E,
        GROUPS=entries.groups,
        RATIO=ratio,
        CHUNKS=triton.cdiv(ratio, block_h),
        PAGE=PAGE_SLOTS,
        BLOCK_H=block_h,
        **sizes,
        **blocks,
    )
    if splits > 1 and not blocks["FUSED_COMBINE"]:
        launch(
            _attend_step_combine_kernel,
            (parts * rows * heads,),
            {"num_warps": 4},
            is_guarded=is_guarded,
            runs_ptr=own.runs,
            **written,
            HEADS=heads,
            **sizes,
        )
    return list(out.unbind())


def splits_of(lanes: int, entries: int, blocks: Mapping[str, int]) -> int:
    """Splits over keys of ``lanes`` (sequence, group) pairs with about ``entries`` each.

    A power of two, since each number of splits compiles to another kernel; at most one per block.
    """
    wanted = blocks["PROGRAMS"] // max(lanes, 1)
    wanted = min(wanted, triton.cdiv(entries, blocks["BLOCK_S"]), MOST_SPLITS)
    return 1 << (int(max(wanted, 1)).bit_length() - 1)


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: bytes in flight against launch width, and both combines."""
    heads, groups, width = shape
    lanes = rows * groups * (1 if heads == groups else triton.cdiv(heads // groups, 64))
    found = []
    seen = set()
    for programs in (132, 264, 528, 1056):
        wanted = {"PROGRAMS": programs, "BLOCK_S": 16}
        splits = splits_of(lanes, 1 << 20, wanted)
        if splits in seen:
            continue
        seen.add(splits)
        for block, stages, warps in (
            (16, 2, 4),
            (16, 3, 4),
            (16, 4, 4),
            (16, 6, 4),
            (32, 2, 4),
            (32, 3, 4),
            (32, 4, 4),
            (64, 2, 4),
            (64, 3, 8),
            (64, 5, 8),
        ):
            for fused in (1, 0) if splits > 1 and (block, stages) == (32, 4) else (1,):
                config = {"BLOCK_S": block, "STAGES": stages, "num_warps": warps}
                found.append({**config, "PROGRAMS": programs, "FUSED_COMBINE": fused})
    return found


def _kind_of(queries: Tensor, pages: Pages) -> Hashable:
    """What two problems must have in common to share a launch."""
    sizes = pages.groups, pages.head_dim, pages.table.stride()
    return queries.dtype, queries.shape, queries.stride(), sizes
