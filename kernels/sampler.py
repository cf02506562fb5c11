"""The greedy sampler and the preparation of the next step's first rows, all in device memory.

``choose``: ``token[b] = argmax_v logits[b, v]``, the first of equal maxima, in two launches.

- ``_maxima_kernel``, grid ``(B, parts)``: the best of ``BLOCK_V`` columns of one row. A candidate
  is one int64 (``ranked``), so that the better of two is the larger integer.
- ``_finish_kernel``, one program: the best of each row's ``partials [B, parts]``; then padding,
  stop tokens and history; then it advances the step counter, counts and positions. One program,
  because it reads the step counter that it advances.

``advance``, grid ``(rows / BLOCK_B,)``, only advances counts and positions. ``embed``, grid
``(n, D / BLOCK_D)``: ``out[n] = table[tokens[n]] + places[positions[n]]``, the second term for
models with learned position embeddings.

Tuning tables: ``maxima`` has shape ``(V,)``, ``finish`` ``(parts,)``, ``advance`` ``(sets,)``,
``embed`` ``(D,)``; rows are ``B``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, overlap, tuning
from fastskip.kernels.blocks import split
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Choice

LEAST = tl.constexpr(-(2**63) + 1)
"""Below every ranked candidate."""


@triton.jit
def ranked(value, index):
    """``value`` fp32 and its ``index`` in one int64 that is larger for the better candidate.

    Better: larger, or first among equals. NaN beats everything, as in torch. The upper half holds
    the value's bits as an integer of the same order, the lower half decreases with the index.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    order = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _maxima_kernel(
    logits_ptr,
    partials_ptr,
    stride_lb,
    stride_pb,
    columns,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = column < columns
    value = numerics.load(logits_ptr + row * stride_lb + column, mask=inside)
    # Columns past the end have larger indices, so they lose to every other one, even to -inf.
    best = tl.max(ranked(tl.where(inside, value, float("-inf")), column), 0)
    tl.store(partials_ptr + row * stride_pb + part, best)


@triton.jit
def _advance_rows(
    counts_ptr,
    grows_ptr,
    positions_ptr,
    stride_cs,
    stride_gs,
    row,
    inside,
    SETS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Advances counts and positions of the rows ``row`` by one step, where ``inside``."""
    position = tl.load(positions_ptr + row, mask=inside, other=0)
    tl.store(positions_ptr + row, position + 1, mask=inside)
    number = tl.arange(0, BLOCK_S)
    both = (number < SETS)[:, None] & inside[None]
    number = number[:, None].to(tl.int64)
    grows = tl.load(grows_ptr + number * stride_gs + row[None], mask=both, other=0)
    count_ptr = counts_ptr + number * stride_cs + row[None]
    count = tl.load(count_ptr, mask=both, other=0)
    tl.store(count_ptr, count + grows, mask=both)


@triton.jit
def _finish_kernel(
    partials_ptr,
    tokens_ptr,
    history_ptr,
    step_ptr,
    unfinished_ptr,
    stops_ptr,
    counts_ptr,
    grows_ptr,
    positions_ptr,
    stride_pb,
    stride_hs,
    stride_cs,
    stride_gs,
    steps,
    pad,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    STOPS: tl.constexpr,
    SETS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    step = tl.load(step_ptr)
    for start in range(0, ROWS, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        inside = row < ROWS
        best = tl.full([BLOCK_B], LEAST, tl.int64)
        row_ptr = partials_ptr + row[:, None].to(tl.int64) * stride_pb
        for first in tl.range(0, PARTS, BLOCK_P, num_stages=STAGES):
            part = first + tl.arange(0, BLOCK_P)
            both = inside[:, None] & (part < PARTS)[None]
            found = tl.load(row_ptr + part[None], mask=both, other=LEAST)
            best = tl.maximum(best, tl.max(found, 1))
        unfinished = tl.load(unfinished_ptr + row, mask=inside, other=0)
        token = tl.where(unfinished != 0, 0x7FFFFFFF - (best & 0x7FFFFFFF), pad)
        for number in range(STOPS):
            unfinished = tl.where(token == tl.load(stops_ptr + number), 0, unfinished)
        tl.store(unfinished_ptr + row, unfinished, mask=inside)
        tl.store(tokens_ptr + row, token, mask=inside)
        # A step past the history is the caller's error, but must not write out of bounds.
        written = inside & (step < steps)
        tl.store(history_ptr + step.to(tl.int64) * stride_hs + row, token, mask=written)
        _advance_rows(
            counts_ptr, grows_ptr, positions_ptr, stride_cs, stride_gs, row, inside, SETS, BLOCK_S
        )
    tl.store(step_ptr, step + 1)


@triton.jit
def _advance_kernel(
    counts_ptr,
    grows_ptr,
    positions_ptr,
    stride_cs,
    stride_gs,
    rows,
    SETS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < rows
    _advance_rows(
        counts_ptr, grows_ptr, positions_ptr, stride_cs, stride_gs, row, inside, SETS, BLOCK_S
    )


@triton.jit
def _embed_kernel(
    tokens_ptr,
    table_ptr,
    positions_ptr,
    places_ptr,
    out_ptr,
    stride_tv,
    stride_pv,
    stride_on,
    width,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        overlap.wait()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    value = numerics.load(table_ptr + token * stride_tv + column, mask=inside)
    if places_ptr is not None:
        position = tl.load(positions_ptr + row).to(tl.int64)
        value += numerics.load(places_ptr + position * stride_pv + column, mask=inside)
    numerics.store(out_ptr + row * stride_on + column, value, mask=inside)


def choose(logits: Tensor, choice: Choice, *, config: Mapping[str, Any] | None = None) -> None:
    """Chooses the greedy token of each row of ``logits [B, V]`` and advances the state by one step.

    ``config`` is that of ``maxima``.
    """
    refuse_gradients(logits=logits)
    rows, columns = logits.shape
    chosen = config or tuning.config_for("maxima", logits.device, rows, (columns,))
    blocks, options = split(chosen)
    parts = triton.cdiv(columns, blocks["BLOCK_V"])
    partials = empty((rows, parts), torch.int64, logits.device)
    launch(
        _maxima_kernel,
        (rows, parts),
        options,
        logits_ptr=logits,
        partials_ptr=partials,
        stride_lb=logits.stride(0),
        stride_pb=partials.stride(0),
        columns=columns,
        **blocks,
    )
    finish(partials, choice)


def finish(partials: Tensor, choice: Choice, *, config: Mapping[str, Any] | None = None) -> None:
    """The second half of ``choose``, from ranked candidates ``[B, parts]`` int64."""
    rows, parts = partials.shape
    sets = len(choice.grows)
    chosen = config or tuning.config_for("finish", partials.device, rows, (parts,))
    blocks, options = split(chosen)
    launch(
        _finish_kernel,
        (1,),
        options,
        partials_ptr=partials,
        tokens_ptr=choice.tokens,
        history_ptr=choice.history,
        step_ptr=choice.step,
        unfinished_ptr=choice.unfinished,
        stops_ptr=choice.stops,
        counts_ptr=choice.counts,
        grows_ptr=choice.grows,
        positions_ptr=choice.positions,
        stride_pb=partials.stride(0),
        stride_hs=choice.history.stride(0),
        stride_cs=choice.counts.stride(0),
        stride_gs=choice.grows.stride(0),
        steps=len(choice.history),
        pad=choice.pad,
        ROWS=rows,
        PARTS=parts,
        STOPS=len(choice.stops),
        SETS=sets,
        BLOCK_S=triton.next_power_of_2(max(sets, 1)),
        **blocks,
    )


def advance(choice: Choice, *, config: Mapping[str, Any] | None = None) -> None:
    """Advances counts and positions by one step: what a step with another sampler needs."""
    sets, rows = choice.counts.shape
    chosen = config or tuning.config_for("advance", choice.counts.device, rows, (sets,))
    blocks, options = split(chosen)
    launch(
        _advance_kernel,
        (triton.cdiv(rows, blocks["BLOCK_B"]),),
        options,
        counts_ptr=choice.counts,
        grows_ptr=choice.grows,
        positions_ptr=choice.positions,
        stride_cs=choice.counts.stride(0),
        stride_gs=choice.grows.stride(0),
        rows=rows,
        SETS=sets,
        BLOCK_S=triton.next_power_of_2(max(sets, 1)),
        **blocks,
    )


def embed(
    tokens: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    positions: Tensor | None = None,
    places: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """``out[n] = table[tokens[n]]``, plus ``places[positions[n]]`` if given: ``[n]`` -> ``[n, D]``.

    ``positions [n]`` int32 must lie within ``places [positions, D]``; the device does not check it.
    """
    refuse_gradients(table=table, places=places, out=out)
    rows, width = out.shape
    chosen = config or tuning.config_for("embed", out.device, rows, (width,))
    blocks, options = split(chosen)
    launch(
        _embed_kernel,
        (rows, triton.cdiv(width, blocks["BLOCK_D"])),
        options,
        tokens_ptr=tokens,
        table_ptr=table,
        positions_ptr=positions,
        places_ptr=places,
        out_ptr=out,
        stride_tv=table.stride(0),
        stride_pv=0 if places is None else places.stride(0),
        stride_on=out.stride(0),
        width=width,
        **blocks,
    )


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations of ``maxima`` and of ``finish`` worth timing; their block names differ."""
    maxima = [
        {"BLOCK_V": block, "num_warps": warps}
        for block in (512, 1024, 2048, 4096)
        for warps in (4, 8)
    ]
    many = ((4, 512, 4), (4, 1024, 8), (16, 128, 8), (16, 256, 8), (16, 512, 16), (64, 64, 8))
    finish = [
        {"BLOCK_B": row, "BLOCK_P": part, "STAGES": stages, "num_warps": warps}
        for row, part, warps in (((1, 1024, 4), (1, 2048, 8), (1, 4096, 8)) if rows == 1 else many)
        for stages in (1, 3)
    ]
    return [*maxima, *finish]
