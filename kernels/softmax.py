"""Online softmax of attention over blocks of paged entries, in fp32.

A block is ``BLOCK_S`` slots of one page. Scores are base-2 exponents: ``factor`` is the scale times
``LOG2_E``. ``entries_ptr`` is where the page at the anchor would have its keys of this head; the
values lie ``PLANE`` elements further. ``table_ptr`` is the sequence's row of the page table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastskip.kernels import numerics

LOG2_E = 1.4426950408889634
LOW = tl.constexpr(-1e30)
"""Below every score; unlike -inf it can be subtracted from itself."""


@triton.jit
def block_at(entries_ptr, table_ptr, slot, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The keys of the block that begins at ``slot``."""
    page = tl.load(table_ptr + slot // PAGE)
    # Slabs and anchors are aligned for wide accesses, and so are the distances between them.
    return entries_ptr + (tl.multiple_of(page, 8) + (slot % PAGE) * HEAD_DIM)


@triton.jit
def attend_one(
    q,
    entries_ptr,
    table_ptr,
    first,
    count,
    step,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One query ``[BLOCK_K]``, times the factor, over the blocks ``first, first + step ..``.

    Returns the unnormalised output ``[1, BLOCK_K]``, the sum of weights and the largest score,
    ``[1]``. Every row of a block keeps its own softmax, so warps synchronise only once, at the end.
    """
    column = tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_S)
    place = within[:, None] * HEAD_DIM + column[None]
    best = tl.full([BLOCK_S], LOW, tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    out = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in tl.range(first, count, step, num_stages=STAGES):
        block_ptr = block_at(entries_ptr, table_ptr, start, PAGE, HEAD_DIM)
        seen = start + within < count
        mask = seen[:, None] & (column < HEAD_DIM)[None]
        k = numerics.load(block_ptr + place, mask)
        v = numerics.load(block_ptr + PLANE + place, mask)
        score = tl.where(seen, tl.sum(k * q[None], 1), LOW)
        top = tl.maximum(best, score)
        weight = tl.exp2(score - top)
        old = tl.exp2(best - top)
        total = total * old + weight
        out = out * old[:, None] + weight[:, None] * v
        best = top
    # A row that has seen no slot gets weight 0; if no row has seen one, all sums are 0.
    top = tl.max(best, 0)
    weight = tl.exp2(best - top)
    none = tl.zeros([1], tl.float32)
    out = tl.sum(out * weight[:, None], 0)
    return out[None], tl.sum(total * weight, 0) + none, top + none


@triton.jit
def attend_many(
    q,
    entries_ptr,
    table_ptr,
    first,
    last,
    step,
    limit,
    out,
    total,
    best,
    factor,
    IS_MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Continues ``BLOCK_M`` queries over the blocks ``first, first + step ..`` below ``last``.

    Query ``m`` sees the slots below ``limit[m]``; unless ``IS_MASKED``, these are all slots of the
    blocks. State and result: output ``[BLOCK_M, BLOCK_K]``, sum of weights and largest score,
    ``[BLOCK_M]``.
    """
    column = tl.arange(0, BLOCK_K)
    within = tl.arange(0, BLOCK_S)
    place = within[:, None] * HEAD_DIM + column[None]
    is_column = (column < HEAD_DIM)[None]
    for start in tl.range(first, last, step, num_stages=STAGES):
        block_ptr = block_at(entries_ptr, table_ptr, start, PAGE, HEAD_DIM)
        slot = start + within
        if IS_MASKED:
            # Memory past the last entry may hold anything, even NaN.
            mask = (slot < last)[:, None] & is_column
        else:
            mask = tl.broadcast_to(is_column, [BLOCK_S, BLOCK_K])
        k = tl.load(block_ptr + place, mask=mask, other=0.0)
        v = tl.load(block_ptr + PLANE + place, mask=mask, other=0.0)
        score = numerics.dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_S], tl.float32)) * factor
        if IS_MASKED:
            seen = slot[None] < limit[:, None]
            score = tl.where(seen, score, LOW)
        top = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - top[:, None])
        if IS_MASKED:
            # For a row that has seen nothing yet: its best is LOW too, and exp2 gives 1.
            weight = tl.where(seen, weight, 0.0)
        old = tl.exp2(best - top)
        total = total * old + tl.sum(weight, 1)
        out = numerics.dot(numerics.round_to(weight, v.dtype), v, out * old[:, None])
        best = top
    return out, total, best
