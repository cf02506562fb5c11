"""Decisions on many rows: moves the trace, takes verdicts, and makes room for the entries kept.

    route           a row decides from its own numbers: h [n, D], snapshot [n, D], found [n, 2]
    decide          rows decide together, from scores [n]
    place_entries   slots and limits, by sequence, of rows whose flag ``held [n]`` is 1

``ops.routes`` defines what is decided, ``ops.fused_routes`` how. Flags are int32, 1 or 0. A launch
of ``route`` (grid ``(n,)``: a program holds one row in registers) moves the trace and takes every
verdict of rows that decide alone; for the others it stores the scores, and each takes a launch of
``decide``. There (grid ``(n / BLOCK_R,)``) every row scans all rows, block by block, and counts,
sums or ranks those of its group: only the device knows the groups, and this way no program has to
wait for another. Sums are taken in the same order for all rows of a group, so these decide alike.
``place_entries``: grid ``(B,)``.

Tuning tables: ``route``, shape ``(D,)``; ``decide`` and ``place_entries``, shape ``()``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, overlap, tuning, verdicts
from fastskip.kernels.blocks import split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Bounds
from fastskip.ops.routes import Group, Move, Route, Verdict, signed


@triton.jit(do_not_specialize=["salts"])
def _route_kernel(
    h_ptr,
    snapshot_ptr,
    found_ptr,
    ran_ptrs,
    positions_ptr,
    asked,
    salts,
    scores_ptr,
    stride_hn,
    stride_sn,
    rows,
    D: tl.constexpr,
    MOVE: tl.constexpr,
    SCORES: tl.constexpr,
    RULES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    is_real = column < D
    # The compiler drops loads and sums that nothing below uses.
    h = numerics.load(h_ptr + row * stride_hn + column, is_real)
    square = tl.sum(h * h)
    before = square
    product = square
    difference = square
    if MOVE != "none":
        snapshot_ptr += row * stride_sn + column
        if MOVE == "next":
            snapshot = numerics.load(snapshot_ptr, is_real)
            before, product = tl.sum(snapshot * snapshot), tl.sum(snapshot * h)
            difference = tl.sum((h - snapshot) * (h - snapshot))
        numerics.store(snapshot_ptr, h, is_real)
    cosine, change = verdicts.moved(
        MOVE, found_ptr, ran_ptrs, row, row >= 0, square, before, product, difference
    )

    position = tl.load(positions_ptr + row)
    for number in tl.static_range(len(SCORES)):
        if SCORES[number] == "linear":
            product = tl.sum(h * tl.load(asked.weights[number] + column, mask=is_real, other=0.0))
        wish = verdicts.score(
            tl.constexpr(SCORES[number]),
            cosine,
            change,
            square,
            product,
            asked.biases[number],
            position,
            salts[number],
            D,
        )
        if RULES[number] != verdicts.ALONE:
            tl.store(scores_ptr + number * rows + row, wish)
        else:
            if number > 0:
                # The candidates may be the rows that the previous verdict lets run.
                tl.debug_barrier()
            is_candidate = tl.load(asked.candidates[number] + row) != 0
            tl.store(
                asked.runs[number] + row, verdicts.answer(wish, asked.bars[number]), is_candidate
            )


@triton.jit(do_not_specialize=["salt", "capacity"])
def _decide_kernel(
    scores_ptr,
    positions_ptr,
    sequences_ptr,
    candidates_ptr,
    runs_ptr,
    bar,
    salt,
    capacity,
    rows,
    RULE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_own = tl.load(candidates_ptr + row, mask=row < rows, other=0) != 0
    position = tl.load(positions_ptr + row, mask=is_own, other=0)
    if sequences_ptr is not None:
        sequence = tl.load(sequences_ptr + row, mask=is_own, other=0)
    wish = None
    if scores_ptr is not None:
        wish = tl.load(scores_ptr + row, mask=is_own, other=0.0)

    members = tl.zeros([BLOCK_R], tl.int32)
    counted = tl.zeros([BLOCK_R], tl.int32)
    latest = tl.full([BLOCK_R], -1, tl.int32)
    total = tl.zeros([BLOCK_R], tl.float32)
    # The compiler drops loads that the rule does not use.
    for first in range(0, rows, BLOCK):
        other = first + tl.arange(0, BLOCK)
        is_candidate = tl.load(candidates_ptr + other, mask=other < rows, other=0) != 0
        is_member = is_own[:, None] & is_candidate[None]
        if sequences_ptr is not None:
            theirs = tl.load(sequences_ptr + other, mask=is_candidate, other=0)
            is_member = is_member & (sequence[:, None] == theirs[None])
        their_wish = wish
        if scores_ptr is not None:
            their_wish = tl.load(scores_ptr + other, mask=is_candidate, other=0.0)
        members, counted, latest, total = verdicts.tally(
            RULE,
            is_member,
            row,
            position,
            wish,
            other,
            tl.load(positions_ptr + other, mask=is_candidate, other=0),
            their_wish,
            bar,
            members,
            counted,
            latest,
            total,
        )
    runs = verdicts.ruling(RULE, members, counted, latest, total, bar, salt, capacity)
    tl.store(runs_ptr + row, runs, mask=is_own)


@triton.jit
def _place_entries_kernel(
    held_ptr, order_ptr, bounds_ptr, counts_ptr, slots_ptr, limits_ptr, rows, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0)
    bounds_ptr += sequence
    first, last = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    seen = tl.load(counts_ptr + sequence)
    for start in range(first, last, BLOCK):
        number = start + tl.arange(0, BLOCK)
        row = tl.load(order_ptr + number, mask=number < last, other=0)
        is_held = tl.load(held_ptr + row, mask=number < last, other=0) != 0
        limit = seen + tl.cumsum(is_held.to(tl.int32))
        tl.store(slots_ptr + row, tl.where(is_held, limit - 1, -1), mask=number < last)
        tl.store(limits_ptr + row, limit, mask=number < last)
        seen += tl.sum(is_held.to(tl.int32))
    tl.store(counts_ptr + sequence, seen)
    if sequence == tl.num_programs(0) - 1:
        for start in range(last, rows, BLOCK):
            number = start + tl.arange(0, BLOCK)
            row = tl.load(order_ptr + number, mask=number < rows, other=0)
            tl.store(slots_ptr + row, -1, mask=number < rows)
            tl.store(limits_ptr + row, 0, mask=number < rows)


def route(h: Tensor, taken: Route, *, config: Mapping[str, Any] | None = None) -> None:
    """Moves the trace, then decides; ``h [n, D]`` is the current residual stream.

    ``config`` is for both kernels; without it each uses its own table. Verdicts of groups or with a
    capacity need ``runs`` that are separate from their ``candidates``.
    """
    refuse_gradients(h=h)
    move = taken.move
    for batch in _batches(taken.verdicts):
        scores: Sequence[Tensor | None] = [None] * len(batch)
        # The rule "latest" needs only positions.
        if move is not Move.NONE or any(verdicts.rule_of(verdict) != "latest" for verdict in batch):
            scores = _route(h, taken, move, batch, config)
            move = Move.NONE
        for verdict, known in zip(batch, scores, strict=True):
            if _is_grouped(verdict):
                _decide(h, taken, verdict, known, config)


def place_entries(
    held: Tensor,
    order: Tensor,
    bounds: Bounds,
    counts: Tensor,
    *,
    config: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Slots ``[n]`` of rows that leave entries, -1 for the others, and limits ``[n]`` of all rows.

    ``held [n]``; ``order [n]``: all rows, sequence by sequence, then those of no sequence, which
    get -1 and 0; ``counts [B]`` is updated.
    """
    assert len(held) == len(order) and counts.is_contiguous()
    blocks, options = split(config or tuning.config_for("place_entries", held.device, len(held)))
    slots, limits = (empty((len(held),), torch.int32, held.device) for _ in range(2))
    launch(
        _place_entries_kernel,
        (bounds.sequences,),
        options,
        held_ptr=held,
        order_ptr=order,
        bounds_ptr=bounds.device,
        counts_ptr=counts,
        slots_ptr=slots,
        limits_ptr=limits,
        rows=len(held),
        **blocks,
    )
    return slots, limits


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing, of ``route`` if there is a shape, else of the other two kernels.

    Never 2 warps: Triton 3.6 miscompiles some reductions there.
    """
    if shape:
        return [{"num_warps": warps} for warps in (1, 4, 8, 16) if shape[0] <= 64 * 32 * warps]
    tiles = [(8, 128), (16, 128), (16, 256), (32, 128), (64, 64)]
    return [{"BLOCK_R": r, "BLOCK": block, "num_warps": 4} for r, block in tiles] + [
        {"BLOCK": block, "num_warps": 4} for block in (256, 512, 1024, 2048)
    ]


def _is_grouped(verdict: Verdict) -> bool:
    return verdicts.rule_of(verdict) != str(verdicts.ALONE.value)


def _batches(found: Sequence[Verdict]) -> Iterator[list[Verdict]]:
    """Verdicts that share a launch: one that rows take alone may need an earlier group's choice, so
    it begins a new batch."""
    batch: list[Verdict] = []
    for verdict in found:
        if not _is_grouped(verdict) and any(map(_is_grouped, batch)):
            yield batch
            batch = []
        batch.append(verdict)
    yield batch


def _route(
    h: Tensor,
    taken: Route,
    move: Move,
    found: Sequence[Verdict],
    config: Mapping[str, Any] | None,
) -> Sequence[Tensor | None]:
    """Launches ``route`` for a batch; the scores ``[n]`` of each verdict if any is of a group."""
    (rows, size), trace = h.shape, taken.trace
    assert h.stride(1) == 1 and (trace is None or trace.found.is_contiguous())
    scores = None
    if any(map(_is_grouped, found)):
        scores = empty((len(found), rows), torch.float32, h.device)
    options = config or tuning.config_for("route", h.device, rows, (size,))
    launch(
        _route_kernel,
        (rows,),
        {"num_warps": options["num_warps"]},
        h_ptr=h,
        snapshot_ptr=None if trace is None else trace.snapshot,
        found_ptr=None if trace is None else trace.found,
        ran_ptrs=tuple(taken.ran) if move is Move.NEXT else (),
        positions_ptr=taken.positions,
        **verdicts.told(found),
        scores_ptr=scores,
        stride_hn=h.stride(0),
        stride_sn=0 if trace is None else trace.snapshot.stride(0),
        rows=rows,
        D=size,
        MOVE=move.value,
        BLOCK_D=triton.next_power_of_2(size),
    )
    return [None] * len(found) if scores is None else list(scores)


def _decide(
    h: Tensor,
    taken: Route,
    verdict: Verdict,
    scores: Tensor | None,
    config: Mapping[str, Any] | None,
) -> None:
    """Launches ``decide`` for one verdict of groups."""
    rule = verdicts.rule_of(verdict)
    is_of_all = verdict.group is Group.BATCH and rule != "capacity"
    blocks, options = split(config or tuning.config_for("decide", h.device, len(h)))
    launch(
        _decide_kernel,
        (triton.cdiv(len(h), blocks["BLOCK_R"]),),
        options,
        scores_ptr=scores,
        positions_ptr=taken.positions,
        sequences_ptr=None if is_of_all else taken.sequences,
        candidates_ptr=verdict.candidates,
        runs_ptr=verdict.runs,
        bar=float(verdict.bar),
        salt=signed(verdict.salt),
        capacity=struct.unpack("<q", struct.pack("<d", verdict.capacity or 0.0))[0],
        rows=len(h),
        RULE=rule,
        **blocks,
    )
