"""Chooses the next layer of a loop and locates its tensors (``ops.hops``).

Kernels in a loop receive the tensors of its first layer and ``now``, the distances to those of the
next layer: each kernel adds the distances that it needs to its pointers (``distance``).
``begin_hops`` chooses the first layer; after that, the update that ends a layer (``residual``)
decides, layer by layer, up to one that some row runs (``choose_next``), and sets the condition of
the loop's node.

``begin_hops`` is a single program, since its rows are few.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import products, verdicts
from fastskip.kernels.conditional import set_conditional, signed
from fastskip.kernels.launch import launch
from fastskip.ops.hops import ALIGNMENT, Field, Hops
from fastskip.ops.routes import Group

LAYER = tl.constexpr(Field.LAYER.value)
ATTENTION_GAIN = tl.constexpr(Field.ATTENTION_GAIN.value)
QKV = tl.constexpr(Field.QKV.value)
TABLE = tl.constexpr(Field.TABLE.value)
OFFSET = tl.constexpr(Field.OFFSET.value)
COUNTS = tl.constexpr(Field.COUNTS.value)
FFN_GAIN = tl.constexpr(Field.FFN_GAIN.value)
FEED = tl.constexpr(Field.FEED.value)
FIELDS = tl.constexpr(len(Field))
BYTES = tl.constexpr(ALIGNMENT)
ELEMENTS = tl.constexpr(4096)
"""Elements per block of rows when scores are computed."""
MOST_ROWS = 64


class Loop(NamedTuple):
    """``Hops`` as passed to a kernel."""

    now: Tensor
    table: Tensor
    layers: int
    live: Tensor
    runs: Tensor
    homes: Tensor
    bars: Tensor
    biases: Tensor
    salts: Tensor
    weights: Tensor | None


@triton.jit
def distance(now_ptr, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Elements, of ``BITS`` each, to a field of the next layer, with an alignment that keeps loads
    wide."""
    return tl.multiple_of(tl.load(now_ptr + FIELD), BYTES * 8 // BITS)


@triton.jit
def weights_step(now_ptr, FIELD: tl.constexpr, BITS: tl.constexpr):
    """``distance`` to a product's weight and bias."""
    return products.Weights(distance(now_ptr, FIELD, BITS), 0, tl.load(now_ptr + FIELD + 1))


@triton.jit
def norm_step(now_ptr, FIELD: tl.constexpr, BITS: tl.constexpr):
    """``distance`` to the weight and bias of the norm of a product's inputs."""
    gain = distance(now_ptr, FIELD, BITS)
    return products.Inputs(0, 0, 0, 0, 0, gain, distance(now_ptr, FIELD + 1, BITS), 0, 0, 0)


@triton.jit
def choose_next(
    loop,
    layer,
    runs,
    condition,
    h_ptr,
    stride_hn,
    cosine,
    change,
    row,
    is_row,
    position,
    sequence,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    RULE: tl.constexpr,
    IS_OF_ALL: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Decides layer by layer until some row runs one; that layer is next.

    No decision has been taken from ``layer`` on; ``runs [ROWS]``: which rows run the layer before
    it, which is next if any row does. ``LAYERS``: a power of two, at least the number of layers.
    """
    live = tl.load(loop.live + row, mask=is_row, other=0) != 0
    some = tl.max(runs, 0)
    # All threads must have read what is overwritten from here on.
    tl.debug_barrier()
    if RULE == verdicts.ALONE and SCORE != "linear":
        if some == 0:
            layer, runs = _decide_on_all(
                loop, layer, live, cosine, change, row, is_row, position, D, SCORE, LAYERS
            )
            some = tl.max(runs, 0)
    else:
        while (some == 0) & (layer < loop.layers):
            runs = _decide(
                loop,
                layer,
                live,
                h_ptr,
                stride_hn,
                cosine,
                change,
                row,
                is_row,
                position,
                sequence,
                D,
                SCORE,
                RULE,
                IS_OF_ALL,
            )
            some = tl.max(runs, 0)
            layer += 1
    tl.store(loop.runs + row, runs, mask=is_row)
    field = tl.arange(0, FIELDS)
    tl.store(loop.now + field, tl.load(loop.table + (layer - 1) * FIELDS + field))
    if condition != 0:
        set_conditional(condition, some)


@triton.jit
def _decide_on_all(
    loop,
    layer,
    live,
    cosine,
    change,
    row,
    is_row,
    position,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """The number after that of the next layer, and which rows run that layer ``[ROWS]``; stores the
    flags of all layers up to it.

    One pass over all layers is enough where rows decide alone, from what is already known.
    """
    number = tl.arange(0, LAYERS)
    is_open = (number >= layer) & (number < loop.layers)
    bar = tl.load(loop.bars + number, mask=is_open, other=0.0)
    salt = tl.load(loop.salts + number, mask=is_open, other=0)
    home = tl.load(loop.homes + number, mask=is_open, other=0)
    none = tl.zeros([row.shape[0], LAYERS], tl.float32)
    wish = verdicts.score(
        SCORE,
        none + cosine[:, None],
        none + change[:, None],
        none,
        none,
        0.0,
        position[:, None],
        salt[None],
        D,
    )
    does = tl.where(live[:, None] & is_open[None], verdicts.answer(wish, bar[None]), 0)
    last = tl.min(tl.where(tl.max(does, 0) != 0, number, loop.layers - 1), 0)
    is_decided = is_open & (number <= last)
    here_ptr = loop.runs + home[None] + row[:, None]
    tl.store(here_ptr, does, mask=is_row[:, None] & is_decided[None])
    return last + 1, tl.sum(tl.where((number == last)[None], does, 0), 1)


@triton.jit
def _decide(
    loop,
    layer,
    live,
    h_ptr,
    stride_hn,
    cosine,
    change,
    row,
    is_row,
    position,
    sequence,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    RULE: tl.constexpr,
    IS_OF_ALL: tl.constexpr,
):
    """Which rows run one layer ``[ROWS]``; stores its flags."""
    bar = tl.load(loop.bars + layer)
    salt = tl.load(loop.salts + layer)
    square = tl.zeros(row.shape, tl.float32)
    product = square
    if SCORE == "linear":
        weight_ptr = loop.weights + layer * D
        square, product = _sums(h_ptr, stride_hn, weight_ptr, row, is_row, D)
    bias = tl.load(loop.biases + layer)
    wish = verdicts.score(SCORE, cosine, change, square, product, bias, position, salt, D)
    runs = verdicts.answer(wish, bar)
    if RULE != verdicts.ALONE:
        is_member = live[:, None] & live[None]
        if not IS_OF_ALL:
            is_member = is_member & (sequence[:, None] == sequence[None])
        runs = verdicts.together(RULE, is_member, row, position, wish, bar, salt)
    runs = tl.where(live, runs, 0)
    tl.store(loop.runs + tl.load(loop.homes + layer) + row, runs, mask=is_row)
    return runs


@triton.jit
def _sums(h_ptr, stride_hn, weight_ptr, row, is_row, D: tl.constexpr):
    """The sums of ``h^2`` and ``weight * h`` of each row."""
    BLOCK: tl.constexpr = ELEMENTS // row.shape[0]
    square = tl.zeros([row.shape[0], BLOCK], tl.float32)
    product = tl.zeros([row.shape[0], BLOCK], tl.float32)
    place = row.to(tl.int64)[:, None] * stride_hn
    for first in range(0, D, BLOCK):
        e = first + tl.arange(0, BLOCK)
        is_read = is_row[:, None] & (e < D)[None]
        # May be written by other multiprocessors during this launch: bypass the L1 cache.
        h = tl.load(h_ptr + place + e[None], mask=is_read, other=0.0, cache_modifier=".cg")
        h = h.to(tl.float32)
        weight = tl.load(weight_ptr + e, mask=e < D, other=0.0)
        square += h * h
        product += h * weight[None]
    return tl.sum(square, 1), tl.sum(product, 1)


@triton.jit(do_not_specialize=["condition"])
def _begin_hops_kernel(
    loop,
    condition: tl.int64,
    h_ptr,
    stride_hn,
    found_ptr,
    positions_ptr,
    sequences_ptr,
    rows,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    RULE: tl.constexpr,
    IS_OF_ALL: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    is_row = row < rows
    cosine = tl.zeros([ROWS], tl.float32)
    change = cosine
    if found_ptr is not None:
        cosine = tl.load(found_ptr + row * 2, mask=is_row, other=0.0)
        change = tl.load(found_ptr + row * 2 + 1, mask=is_row, other=0.0)
    choose_next(
        loop,
        tl.full((), 1, tl.int32),
        tl.load(loop.runs + tl.load(loop.homes) + row, mask=is_row, other=0),
        condition,
        h_ptr,
        stride_hn,
        cosine,
        change,
        row,
        is_row,
        tl.load(positions_ptr + row, mask=is_row, other=0),
        tl.load(sequences_ptr + row, mask=is_row, other=0),
        D,
        SCORE,
        RULE,
        IS_OF_ALL,
        LAYERS,
    )


def begin_hops(h: Tensor, hops: Hops, condition: int = 0) -> None:
    """Chooses the first layer of a loop that ``h [n, D]`` enters.

    It is the first of ``hops`` if its flags name a row, else the first later one that some row
    runs. ``condition``: the handle of the loop's node, or 0.
    """
    if len(h) > MOST_ROWS:
        raise ValueError(f"h: {len(h)} rows; allowed: at most {MOST_ROWS}")
    score, rule, is_of_all, layers = form_of(hops)
    launch(
        _begin_hops_kernel,
        (1,),
        {"num_warps": 4},
        loop=loop_of(hops),
        condition=signed(condition),
        h_ptr=h,
        stride_hn=h.stride(0),
        found_ptr=None if hops.trace is None else hops.trace.found,
        positions_ptr=hops.positions,
        sequences_ptr=hops.sequences,
        rows=len(h),
        D=h.shape[1],
        SCORE=score,
        RULE=rule,
        IS_OF_ALL=is_of_all,
        LAYERS=layers,
        ROWS=triton.next_power_of_2(len(h)),
    )


def form_of(hops: Hops) -> tuple[str, str, bool, int]:
    """What the code of a loop is specialised on: score, rule, whether all rows decide together, and
    a power of two that is at least its number of layers."""
    terms, layers = hops.terms, triton.next_power_of_2(len(hops.layers))
    return terms.score.value, verdicts.rule_of(terms), terms.group is Group.BATCH, layers


def loop_of(hops: Hops) -> Loop:
    """A loop as passed to a kernel."""
    own = hops.decisions
    return Loop(
        now=hops.now,
        table=hops.table,
        layers=len(hops.layers),
        live=hops.live,
        runs=hops.runs,
        homes=own.homes,
        bars=own.bars,
        biases=own.biases,
        salts=own.salts,
        weights=own.weights,
    )
