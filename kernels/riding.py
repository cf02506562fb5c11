"""Decisions at the end of a residual update, without a launch of their own, for few rows.

A program of the update owns tiles ``[BLOCK_N, BLOCK_M]`` of the new ``h [n, M]``. For each tile it
stores, per row, the partial sums that verdicts need, and the snapshot if the trace moves. The last
program to arrive adds the parts up, tile by tile, so that the result does not depend on which one
is last, and decides for all rows: on one layer, or on as many as it takes to find the next layer of
a loop (``hops``).

``parts [sums, n, TILES]`` fp32; the sums are ``h^2``, ``s^2``, ``s * h``, ``(h - s)^2`` with the
snapshot ``s``, then ``weight * h`` of each verdict.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor, float32

from fastskip.kernels import hops, numerics, verdicts
from fastskip.kernels.arrivals import is_last
from fastskip.kernels.conditional import signed
from fastskip.ops.allocate import empty
from fastskip.ops.hops import Hops
from fastskip.ops.routes import Group, Move, Route, Score

SUMS = tl.constexpr(4)
"""Sums stored ahead of those of the verdicts."""
ELEMENTS = tl.constexpr(1024)
"""Elements per block of parts."""
MOST_ROWS = 64


class Riding(NamedTuple):
    """The route that an update carries, as passed to its kernel."""

    snapshot: Tensor | None
    found: Tensor | None
    ran: tuple[Tensor, ...]
    positions: Tensor
    sequences: Tensor
    asked: verdicts.Asked
    parts: Tensor
    arrivals: Tensor
    stride_sn: int


@triton.jit
def ride(
    then,
    salts,
    h_ptr,
    stride_hn,
    start,
    rows,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOVE: tl.constexpr,
    SCORES: tl.constexpr,
    RULES: tl.constexpr,
    IS_OF_ALL: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    loop,
    condition,
    HOP: tl.constexpr,
):
    """The end of a program that owns rows from ``start`` of every ``tl.num_programs(1)``-th tile.

    Its part of ``h`` is final, whether or not it had anything to add.
    """
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    # Threads read what other threads have stored.
    tl.debug_barrier()
    for tile in range(tl.program_id(1), TILES, tl.num_programs(1)):
        _leave(
            then,
            h_ptr,
            stride_hn,
            tile,
            start,
            rows,
            M,
            TILES,
            BLOCK_M,
            BLOCK_N,
            MOVE,
            SCORES,
            HAS_SUMS,
        )
    if is_last(then.arrivals, tl.num_programs(0) * tl.num_programs(1)):
        if HOP is None:
            _settle(then, salts, rows, M, TILES, MOVE, SCORES, RULES, IS_OF_ALL, HAS_SUMS, ROWS)
        else:
            _hop(
                then,
                loop,
                condition,
                h_ptr,
                stride_hn,
                rows,
                M,
                TILES,
                MOVE,
                HOP,
                HAS_SUMS,
                ROWS,
            )


@triton.jit
def _leave(
    then,
    h_ptr,
    stride_hn,
    tile,
    start,
    rows,
    M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOVE: tl.constexpr,
    SCORES: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """Stores the partial sums of a tile and its new snapshot."""
    n = start + tl.arange(0, BLOCK_N)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (n < rows)[:, None] & (m < M)[None]
    row = n.to(tl.int64)[:, None]
    h = numerics.load(h_ptr + row * stride_hn + m[None], inside)
    # The parts of each sum form a plane, whose offset is added to the scalar pointer.
    plane = rows * TILES
    parts_ptr = then.parts + tile
    place = n * TILES
    if HAS_SUMS:
        tl.store(parts_ptr + place, tl.sum(h * h, 1), mask=n < rows)
    if MOVE != "none":
        snapshot_ptr = then.snapshot + row * then.stride_sn + m[None]
        if MOVE == "next":
            before = numerics.load(snapshot_ptr, inside)
            other = h - before
            tl.store(parts_ptr + plane + place, tl.sum(before * before, 1), mask=n < rows)
            tl.store(parts_ptr + 2 * plane + place, tl.sum(before * h, 1), mask=n < rows)
            tl.store(parts_ptr + 3 * plane + place, tl.sum(other * other, 1), mask=n < rows)
        numerics.store(snapshot_ptr, h, inside)
    for number in tl.static_range(len(SCORES)):
        if SCORES[number] == "linear":
            weight = tl.load(then.asked.weights[number] + m, mask=m < M, other=0.0)
            product = tl.sum(h * weight[None], 1)
            tl.store(parts_ptr + (SUMS + number) * plane + place, product, mask=n < rows)


@triton.jit
def _settle(
    then,
    salts,
    rows,
    M: tl.constexpr,
    TILES: tl.constexpr,
    MOVE: tl.constexpr,
    SCORES: tl.constexpr,
    RULES: tl.constexpr,
    IS_OF_ALL: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up the parts that all programs stored, moves the trace and decides."""
    row = tl.arange(0, ROWS)
    is_row = row < rows
    plane = rows * TILES
    square, cosine, change = _move_on(then, row, is_row, plane, TILES, MOVE, HAS_SUMS)
    product = square
    position = tl.load(then.positions + row, mask=is_row, other=0)
    sequence = tl.load(then.sequences + row, mask=is_row, other=0)
    for number in tl.static_range(len(SCORES)):
        if SCORES[number] == "linear":
            product = _total(then.parts + (SUMS + number) * plane, row, is_row, TILES)
        wish = verdicts.score(
            tl.constexpr(SCORES[number]),
            cosine,
            change,
            square,
            product,
            then.asked.biases[number],
            position,
            salts[number],
            M,
        )
        if number > 0:
            # The candidates may be the rows that the previous verdict lets run.
            tl.debug_barrier()
        is_candidate = tl.load(then.asked.candidates[number] + row, mask=is_row, other=0) != 0
        runs = verdicts.answer(wish, then.asked.bars[number])
        if RULES[number] != verdicts.ALONE:
            is_member = is_candidate[:, None] & is_candidate[None]
            if not IS_OF_ALL[number]:
                is_member = is_member & (sequence[:, None] == sequence[None])
            runs = verdicts.together(
                tl.constexpr(RULES[number]),
                is_member,
                row,
                position,
                wish,
                then.asked.bars[number],
                salts[number],
            )
        tl.store(then.asked.runs[number] + row, runs, mask=is_candidate)


@triton.jit
def _hop(
    then,
    loop,
    condition,
    h_ptr,
    stride_hn,
    rows,
    M: tl.constexpr,
    TILES: tl.constexpr,
    MOVE: tl.constexpr,
    HOP: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Moves the trace and chooses the next layer."""
    row = tl.arange(0, ROWS)
    is_row = row < rows
    _, cosine, change = _move_on(then, row, is_row, rows * TILES, TILES, MOVE, HAS_SUMS)
    hops.choose_next(
        loop,
        tl.load(loop.now + hops.LAYER).to(tl.int32) + 1,
        tl.zeros([ROWS], tl.int32),
        condition,
        h_ptr,
        stride_hn,
        cosine,
        change,
        row,
        is_row,
        tl.load(then.positions + row, mask=is_row, other=0),
        tl.load(then.sequences + row, mask=is_row, other=0),
        M,
        tl.constexpr(HOP[0]),
        tl.constexpr(HOP[1]),
        tl.constexpr(HOP[2]),
        tl.constexpr(HOP[3]),
    )


@triton.jit
def _move_on(
    then,
    row,
    is_row,
    plane,
    TILES: tl.constexpr,
    MOVE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """Each row's sum of squares, and its cosine and change after the trace has moved."""
    square = tl.zeros(row.shape, tl.float32)
    if HAS_SUMS:
        square = _total(then.parts, row, is_row, TILES)
    before = square
    product = square
    difference = square
    if MOVE == "next":
        before = _total(then.parts + plane, row, is_row, TILES)
        product = _total(then.parts + 2 * plane, row, is_row, TILES)
        difference = _total(then.parts + 3 * plane, row, is_row, TILES)
    cosine, change = verdicts.moved(
        MOVE, then.found, then.ran, row, is_row, square, before, product, difference
    )
    return square, cosine, change


@triton.jit
def _total(parts_ptr, row, is_row, TILES: tl.constexpr):
    """The sum of each row's parts: ``[ROWS]``."""
    BLOCK: tl.constexpr = ELEMENTS // row.shape[0]
    tile = tl.arange(0, BLOCK)
    found = tl.zeros([row.shape[0], BLOCK], tl.float32)
    for first in tl.static_range(0, TILES, BLOCK):
        is_part = is_row[:, None] & (first + tile < TILES)[None]
        part_ptr = parts_ptr + first + row[:, None] * TILES + tile[None]
        # Written by other multiprocessors during this launch: bypass the L1 cache.
        found += tl.load(part_ptr, mask=is_part, other=0.0, cache_modifier=".cg")
    return tl.sum(found, 1)


def can_ride(then: Route, rows: int) -> bool:
    """Whether an update of ``rows`` rows can carry a route."""
    return rows <= MOST_ROWS and all(verdict.capacity is None for verdict in then.verdicts)


def carried(then: Route | None, h: Tensor, tiles: int) -> dict[str, Any]:
    """The kernel arguments for a route that is carried by a kernel with ``tiles`` tiles of columns
    of ``h [n, M]``."""
    if then is None:
        names = ("then", "salts", "MOVE", "SCORES", "RULES", "IS_OF_ALL", "HAS_SUMS", "ROWS")
        return dict.fromkeys(names)
    if not can_ride(then, len(h)):
        limits = [each.capacity for each in then.verdicts if each.capacity is not None]
        raise ValueError(
            f"then: {len(h)} rows, capacities {limits}; "
            f"allowed: at most {MOST_ROWS} rows, no capacities"
        )
    found, trace = then.verdicts, then.trace
    assert trace is None or trace.found.is_contiguous()
    asked = verdicts.told(found)
    riding = Riding(
        snapshot=None if trace is None else trace.snapshot,
        found=None if trace is None else trace.found,
        ran=tuple(then.ran) if then.move is Move.NEXT else (),
        positions=then.positions,
        sequences=then.sequences,
        asked=asked.pop("asked"),
        parts=empty((SUMS.value + len(found), len(h), tiles), float32, h.device),
        arrivals=then.arrivals,
        stride_sn=0 if trace is None else trace.snapshot.stride(0),
    )
    return {
        "then": riding,
        **asked,
        "MOVE": then.move.value,
        "IS_OF_ALL": tuple(verdict.group is Group.BATCH for verdict in found),
        "HAS_SUMS": then.move is Move.NEXT or Score.LINEAR.value in asked["SCORES"],
        "ROWS": triton.next_power_of_2(len(h)),
    }


def hopping(loop: Hops | None, condition: int) -> dict[str, Any]:
    """The kernel arguments for a loop, for the kernel that ends a layer and carries its ``route``;
    ``condition``: the handle of its node."""
    if loop is None:
        return {"loop": None, "condition": 0, "HOP": None}
    form = hops.form_of(loop)
    return {"loop": hops.loop_of(loop), "condition": signed(condition), "HOP": form}
