"""Copies cache entries from one layer's cache to another's, or into dense tensors.

    target[sequence, to_slot] = source[sequence, from_slot]        keys and values, [2G, K] per row
    keys[n], values[n] = source[sequence, slot]                    [G, K] each

``sequences``, ``from_slots``, ``to_slots [n]``; a row with a negative slot, or with a flag of 1 in
``runs [n]``, copies nothing. The heads of an entry lie ``PAGE * K`` elements apart. Grid
``(n, 2G / BLOCK_H)``. Tuning table: ``copy_entries``, shape ``(G, K)``, for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import overlap, tuning
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE as PAGE_SLOTS
from fastskip.ops.contracts import Pages


@triton.jit
def _copy_entries_kernel(
    source_ptr,
    source_table_ptr,
    target_ptr,
    target_table_ptr,
    sequences_ptr,
    from_slots_ptr,
    to_slots_ptr,
    runs_ptr,
    stride_sb,
    stride_tb,
    source_offset,
    target_offset,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row = tl.program_id(0)
    from_slot = tl.load(from_slots_ptr + row)
    to_slot = tl.load(to_slots_ptr + row)
    if (from_slot < 0) | (to_slot < 0):
        return
    if runs_ptr is not None and tl.load(runs_ptr + row) != 0:
        return
    sequence = tl.load(sequences_ptr + row).to(tl.int64)
    source_start = tl.load(source_table_ptr + sequence * stride_sb + from_slot // PAGE)
    target_start = tl.load(target_table_ptr + sequence * stride_tb + to_slot // PAGE)
    # Slabs and anchors are aligned for wide accesses, and so are the distances between them.
    source_ptr += tl.multiple_of(source_start, 8) + source_offset + (from_slot % PAGE) * HEAD_DIM
    target_ptr += tl.multiple_of(target_start, 8) + target_offset + (to_slot % PAGE) * HEAD_DIM

    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    element = tl.arange(0, BLOCK_K)
    is_real = (head < 2 * GROUPS)[:, None] & (element < HEAD_DIM)[None, :]
    within = head[:, None] * (PAGE * HEAD_DIM) + element[None, :]
    # A plain copy of bits, without conversion to fp32 and back.
    tl.store(target_ptr + within, tl.load(source_ptr + within, mask=is_real), mask=is_real)


def copy_entries(
    source: Pages,
    target: Pages,
    sequences: Tensor,
    from_slots: Tensor,
    to_slots: Tensor,
    runs: Tensor | None = None,
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Copies entries of one layer's cache to another's; ``[n]`` each, negative slots are skipped.

    Rows with a flag of 1 in ``runs [n]`` have entries of their own and are skipped too. Rows are
    copied in no particular order: no slot may be both read and written, or written twice.
    """
    rows, groups, size = len(sequences), source.groups, source.head_dim
    shape = (groups, size)
    options = dict(config or tuning.config_for("copy_entries", sequences.device, rows, shape))
    block = options.pop("BLOCK_H")
    launch(
        _copy_entries_kernel,
        (rows, triton.cdiv(2 * groups, block)),
        options,
        is_guarded=runs is not None,
        source_ptr=source.anchor,
        source_table_ptr=source.table,
        target_ptr=target.anchor,
        target_table_ptr=target.table,
        sequences_ptr=sequences,
        from_slots_ptr=from_slots,
        to_slots_ptr=to_slots,
        runs_ptr=runs,
        stride_sb=source.table.stride(0),
        stride_tb=target.table.stride(0),
        source_offset=source.offset,
        target_offset=target.offset,
        GROUPS=groups,
        HEAD_DIM=size,
        PAGE=PAGE_SLOTS,
        BLOCK_H=block,
        BLOCK_K=triton.next_power_of_2(size),
    )


@triton.jit
def _read_entries_kernel(
    pages_ptr,
    table_ptr,
    sequences_ptr,
    slots_ptr,
    out_ptr,
    stride_tb,
    stride_out,
    offset,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    sequence = tl.load(sequences_ptr + row).to(tl.int64)
    start = tl.load(table_ptr + sequence * stride_tb + slot // PAGE)
    pages_ptr += tl.multiple_of(start, 8) + offset + (slot % PAGE) * HEAD_DIM
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    element = tl.arange(0, BLOCK_K)
    is_real = (head < 2 * GROUPS)[:, None] & (element < HEAD_DIM)[None, :]
    within = head[:, None] * (PAGE * HEAD_DIM) + element[None, :]
    # Keys of all rows come first, then values.
    out = (head // GROUPS).to(tl.int64) * stride_out + row * (GROUPS * HEAD_DIM)
    out_ptrs = out_ptr + out[:, None] + (head % GROUPS)[:, None] * HEAD_DIM + element[None, :]
    tl.store(out_ptrs, tl.load(pages_ptr + within, mask=is_real), mask=is_real)


def read_entries(
    pages: Pages, sequences: Tensor, slots: Tensor, *, config: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, G, K]`` of entries, as dense tensors; no slot may be negative."""
    rows, groups, size = len(sequences), pages.groups, pages.head_dim
    options = dict(
        config or tuning.config_for("copy_entries", sequences.device, rows, (groups, size))
    )
    block = options.pop("BLOCK_H")
    out = empty((2, rows, groups, size), pages.anchor.dtype, pages.anchor.device)
    launch(
        _read_entries_kernel,
        (rows, triton.cdiv(2 * groups, block)),
        options,
        pages_ptr=pages.anchor,
        table_ptr=pages.table,
        sequences_ptr=sequences,
        slots_ptr=slots,
        out_ptr=out,
        stride_tb=pages.table.stride(0),
        stride_out=out.stride(0),
        offset=pages.offset,
        GROUPS=groups,
        HEAD_DIM=size,
        PAGE=PAGE_SLOTS,
        BLOCK_H=block,
        BLOCK_K=triton.next_power_of_2(size),
    )
    keys, values = out
    return keys, values


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: up to 64 elements per thread, no more heads than exist."""
    groups, size = shape
    most = triton.next_power_of_2(2 * groups)
    return [
        {"BLOCK_H": block, "num_warps": warps}
        for block in (2, 4, 8, 16, 32, 64)
        for warps in (1, 2, 4, 8)
        if block <= most and block * size <= 64 * 32 * warps
    ]
