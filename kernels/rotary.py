"""RoPE of queries and keys, and the append of keys and values to the pages of a cache.

    head = head * rsqrt(mean(head^2) + epsilon) * weight       if heads have norms
    first, second = halves of a head
    rotated = [first * cosine - second * sine | second * cosine + first * sine]

``heads [n, H + 2G, K]``: queries, keys, values; ``cosine``, ``sine [positions, K / 2]``. Queries
are rotated in place; rotated keys and plain values go to their slots, head ``e`` of the ``2G`` at
``table[sequence, slot // PAGE] + offset + (e * PAGE + slot % PAGE) * K``. Grid
``(n, heads / BLOCK_H)``. Rows whose flag in ``runs [n]`` is 0 keep their queries as they are, and
leave entries only if all rows do. With ``index`` and ``count [1]``, ``heads`` are those of rows
``index[:count]``: positions and slots are read, and queries written, at these rows. Tuning table:
``rotate_append``, shape ``(H, G, K)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, overlap, tuning
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE as PAGE_SLOTS
from fastskip.ops.contracts import HeadNorms, Projection
from fastskip.ops.routes import Chosen


@triton.jit
def rotate(first, second, cosine, sine):
    """Both halves of a head, rotated, in fp32."""
    return first * cosine - second * sine, second * cosine + first * sine


class Weighing(NamedTuple):
    """The norms of query and key heads: weights ``[K]``, and epsilons added to the mean squares."""

    queries: Any
    keys: Any
    queries_epsilon: Any
    keys_epsilon: Any


@triton.jit
def _normalize_heads(
    first,
    second,
    head,
    element,
    is_real,
    norms,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Normalises both halves of heads ``[H, K / 2]``, which are 0 beyond the head; values are left
    unchanged."""
    is_query = (head < QUERIES)[:, None]
    is_normed = (head < QUERIES + GROUPS)[:, None]
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    epsilon = tl.where(head < QUERIES, norms.queries_epsilon, norms.keys_epsilon)
    scale = tl.rsqrt(mean + epsilon)[:, None]
    query = numerics.load(norms.queries + element, is_real)[None, :]
    key = numerics.load(norms.keys + element, is_real)[None, :]
    other_query = numerics.load(norms.queries + HALF + element, is_real)[None, :]
    other_key = numerics.load(norms.keys + HALF + element, is_real)[None, :]
    normed_first = first * scale * tl.where(is_query, query, key)
    normed_second = second * scale * tl.where(is_query, other_query, other_key)
    return tl.where(is_normed, normed_first, first), tl.where(is_normed, normed_second, second)


@triton.jit
def _rotate_append_kernel(
    heads_ptr,
    cosine_ptr,
    sine_ptr,
    positions_ptr,
    anchor_ptr,
    table_ptr,
    sequences_ptr,
    slots_ptr,
    runs_ptr,
    index_ptr,
    count_ptr,
    out_ptr,
    norms,
    stride_xn,
    stride_xh,
    stride_on,
    stride_oh,
    stride_tb,
    offset,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    LEAVES_ALL: tl.constexpr,
    MOVES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    number = tl.program_id(0).to(tl.int64)
    row = number
    if MOVES:
        if number >= tl.load(count_ptr):
            return
        row = tl.load(index_ptr + number).to(tl.int64)
    if runs_ptr is not None:
        does_run = tl.load(runs_ptr + row) != 0
        if not (does_run | LEAVES_ALL):
            return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if cosine_ptr is None and not MOVES:
        # Queries that are not rotated are left alone.
        head += QUERIES
    element = tl.arange(0, BLOCK_K)
    is_real = element < HALF
    is_query = head < QUERIES
    if runs_ptr is not None:
        is_query = is_query & does_run
    is_entry = (head >= QUERIES) & (head < QUERIES + 2 * GROUPS)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row)
        is_entry = is_entry & (slot >= 0)

    first_ptr = heads_ptr + number * stride_xn + head[:, None] * stride_xh + element[None, :]
    is_read = (is_query | is_entry)[:, None] & is_real[None, :]
    first = numerics.load(first_ptr, is_read)
    second = numerics.load(first_ptr + HALF, is_read)
    if norms is not None:
        first, second = _normalize_heads(
            first, second, head, element, is_real, norms, QUERIES, GROUPS, HALF
        )
    if cosine_ptr is not None:
        position = tl.load(positions_ptr + row).to(tl.int64)
        cosine = numerics.load(cosine_ptr + position * HALF + element, is_real)[None, :]
        sine = numerics.load(sine_ptr + position * HALF + element, is_real)[None, :]
        turned_first, turned_second = rotate(first, second, cosine, sine)
        does_turn = (head < QUERIES + GROUPS)[:, None]
        first = tl.where(does_turn, turned_first, first)
        second = tl.where(does_turn, turned_second, second)
    if cosine_ptr is not None or MOVES:
        query_ptr = out_ptr + row * stride_on + head[:, None] * stride_oh + element[None, :]
        is_written = is_query[:, None] & is_real[None, :]
        numerics.store(query_ptr, first, is_written)
        numerics.store(query_ptr + HALF, second, is_written)

    if slots_ptr is not None:
        sequence = tl.load(sequences_ptr + row).to(tl.int64)
        start_ptr = table_ptr + sequence * stride_tb + slot // PAGE
        # Slabs and anchor are aligned for wide accesses, and so is the distance between them.
        start = tl.multiple_of(tl.load(start_ptr, mask=slot >= 0, other=0), 8)
        entry = (head - QUERIES) * PAGE + slot % PAGE
        entry_ptr = anchor_ptr + start + offset + entry[:, None] * HEAD_DIM + element[None, :]
        is_written = is_entry[:, None] & is_real[None, :]
        numerics.store(entry_ptr, first, is_written)
        numerics.store(entry_ptr + HALF, second, is_written)


def rotate_append(
    heads: Tensor,
    projection: Projection,
    *,
    runs: Tensor | None = None,
    chosen: Chosen | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """Norms and rotates the queries of ``heads [n, H + 2G, K]`` in place; stores keys and values.

    ``heads`` is scratch: the returned queries, ``[n, H, K]``, are a view of it. A row with a
    negative slot leaves no entry, nor does one whose flag in ``runs [n]`` is 0, unless
    ``projection.leaves_all``; the queries of the latter are left unchanged.

    ``chosen``, with a bound: ``heads`` are those of its rows, and the returned queries,
    ``[N, H, K]``, are a new tensor in which these rows have their places among all ``N``.
    """
    refuse_gradients(heads=heads)
    targets, pages, rotation = projection.targets, projection.pages, projection.rotation
    norms = projection.head_norms
    assert heads.stride(2) == 1
    assert norms is None or rotation is not None
    assert rotation is None or rotation.cosine.is_contiguous() and rotation.sine.is_contiguous()
    rows, queries, size = len(heads), projection.heads, projection.head_dim
    groups = 0 if pages is None else pages.groups
    shape = (queries, groups, size)
    turned = heads
    if chosen is not None:
        assert runs is None and not projection.leaves_all
        turned = empty((len(chosen.runs), queries, size), heads.dtype, heads.device)
    options = dict(config or tuning.config_for("rotate_append", heads.device, rows, shape))
    if norms is not None:
        # Triton 3.6 miscompiles some reductions of 2 warps.
        options["num_warps"] = max(4, options["num_warps"])
    block = options.pop("BLOCK_H")
    touched = 2 * groups + (queries if rotation is not None or chosen is not None else 0)
    launch(
        _rotate_append_kernel,
        (rows, triton.cdiv(touched, block)),
        options,
        is_guarded=runs is not None or chosen is not None,
        heads_ptr=heads,
        cosine_ptr=None if rotation is None else rotation.cosine,
        sine_ptr=None if rotation is None else rotation.sine,
        positions_ptr=None if rotation is None else targets.positions,
        anchor_ptr=None if pages is None else pages.anchor,
        table_ptr=None if pages is None else pages.table,
        sequences_ptr=None if pages is None else targets.sequences,
        slots_ptr=None if pages is None else targets.slots,
        runs_ptr=runs,
        index_ptr=None if chosen is None else chosen.index,
        count_ptr=None if chosen is None else chosen.count,
        out_ptr=turned,
        norms=None if norms is None else _weighing(norms),
        stride_xn=heads.stride(0),
        stride_xh=heads.stride(1),
        stride_on=turned.stride(0),
        stride_oh=turned.stride(1),
        stride_tb=0 if pages is None else pages.table.stride(0),
        offset=0 if pages is None else pages.offset,
        QUERIES=queries,
        GROUPS=groups,
        HEAD_DIM=size,
        PAGE=PAGE_SLOTS,
        LEAVES_ALL=pages is not None and projection.leaves_all,
        MOVES=chosen is not None,
        BLOCK_H=block,
        BLOCK_K=triton.next_power_of_2(size // 2),
    )
    return turned[:, :queries]


def _weighing(norms: HeadNorms) -> Weighing:
    queries, keys = norms.queries, norms.keys
    return Weighing(queries.weight, keys.weight, queries.epsilon, keys.epsilon)


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: up to 64 elements per thread, no more heads than exist."""
    queries, groups, size = shape
    most = triton.next_power_of_2(queries + 2 * groups)
    return [
        {"BLOCK_H": block, "num_warps": warps}
        for block in (2, 4, 8, 16, 32, 64)
        for warps in (1, 2, 4, 8)
        if block <= most and block * size <= 64 * 32 * warps
    ]
