"""Inner loops of the decode products: weights stream through once, each program owns some of them.

    y[m, n] = sum over e of weight[m, e] * norm(x[index[n]] + change[n])[e]

``weight [M, E]`` (``M`` out features, dense rows), ``x [N, E]``, ``change [n, E]``, norm weights
``[E]``; the result is ``[BLOCK_M, BLOCK_N]`` in fp32, before any bias. ``m`` lists the weight rows
of a program, in any order, so that rows that belong together (both halves of a rotary pair, gate
and up) can share a program: ``pair_rows`` interleaves them, ``split_pairs`` separates the results.

Two forms. Streaming, for ``BLOCK_N`` of 1, 2 or 4: elementwise products accumulate in registers,
with one reduction at the end. Tensor, for ``BLOCK_N`` of at least 16: the weights are the M operand
of matrix instructions, WGMMA on sm_90 if ``BLOCK_M`` is at least 64.

RMS norm needs no extra pass: the sum of squares accumulates from the same tiles, and its root
divides the result. Two cases compute the statistics first: LayerNorm, and RMS norm of fp16 rows in
the tensor form, where a row times the norm's weights could overflow the storage dtype. A half norm
(``contracts.HalfNorm``) only divides: its weights are not read, and no square is computed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastskip.kernels import numerics

NO_NORM = tl.constexpr(0)
RMS_NORM = tl.constexpr(1)
LAYER_NORM = tl.constexpr(2)


class Inputs(NamedTuple):
    """What a product reads: ``norm(x[index] + change)``. ``index``, ``change`` and ``shift``, the
    norm's bias, may be ``None``, and without a norm so may its weight, ``gain``.

    A half norm provides ``squares [n, sums]``, where ``sums`` is a constant; the product then sees
    no other norm.
    """

    x: Any
    stride: Any
    index: Any = None
    change: Any = None
    change_stride: Any = 0
    gain: Any = None
    shift: Any = None
    epsilon: Any = 0.0
    squares: Any = None
    sums: Any = None


class Weights(NamedTuple):
    """``weight [M, E]``, and ``bias [M]`` or ``None``."""

    weight: Any
    stride: Any
    bias: Any = None


@triton.jit
def product(
    weights,
    m,
    inputs,
    start,
    rows,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    part=None,
    step=None,
    share=None,
):
    """``[BLOCK_M, BLOCK_N]``: weight rows ``m`` times rows ``start, start + 1, ..`` of ``inputs``.

    ``m [BLOCK_M]`` must lie within the weight (clamp it). Rows from ``rows`` on yield meaningless
    finite numbers. ``part``: the problem, of several, whose inputs to read; ``step``: elements from
    each tensor of one problem to that of the next. ``share``: which share of the reduction, ``E``
    elements each, to compute (not with changes or with a norm that is applied here).
    """
    if part is not None:
        # Inlined: a function cannot return a tuple whose fields may be None.
        inputs = Inputs(
            inputs.x + part * step.x,
            inputs.stride,
            inputs.index,
            None if inputs.change is None else inputs.change + part * step.change,
            inputs.change_stride,
            None if inputs.gain is None else inputs.gain + part * step.gain,
            None if inputs.shift is None else inputs.shift + part * step.shift,
            inputs.epsilon,
        )
    weight_ptrs = weights.weight + m.to(tl.int64)[:, None] * weights.stride
    x_ptr = inputs.x
    if share is not None:
        weight_ptrs += share * E
        x_ptr += share * E
    if BLOCK_N < 16:
        return _stream(weight_ptrs, x_ptr, inputs, start, rows, E, NORM, BLOCK_N, BLOCK_E, STAGES)
    else:
        return _tensor(weight_ptrs, x_ptr, inputs, start, rows, E, NORM, BLOCK_N, BLOCK_E, STAGES)


@triton.jit
def pair_rows(pair, SPAN: tl.constexpr, GAP: tl.constexpr):
    """Weight rows of ``pair [P]``, first and second alternating: ``[2P]``.

    Pairs come in spans of ``SPAN``; the second row lies ``GAP`` after the first. Heads:
    ``SPAN = GAP = K / 2``; gate and up: ``SPAN = GAP = F``.
    """
    first = pair // SPAN * (SPAN + GAP) + pair % SPAN
    return tl.join(first, first + GAP).reshape(2 * pair.shape[0])


@triton.jit
def split_pairs(y):
    """``[2P, N] -> [P, N]`` twice: the results of the first and second rows of ``pair_rows``."""
    pairs: tl.constexpr = y.shape[0] // 2
    return tl.split(y.reshape(pairs, 2, y.shape[1]).permute(0, 2, 1))


@triton.jit
def _stream(
    weight_ptrs,
    x_ptr,
    inputs,
    start,
    rows,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    # One accumulator per row instead of one with three axes: the weights keep the layout in which
    # they were loaded.
    # A tuple of numbers stays constexpr only while it is not bound to a name.
    n = [tl.minimum(start + number, rows - 1) for number in (0, 1, 2, 3)[:BLOCK_N]]
    x_ptrs = [x_ptr + source(inputs.index, each) * inputs.stride for each in n]
    change_ptrs = [
        None if inputs.change is None else inputs.change + each.to(tl.int64) * inputs.change_stride
        for each in n
    ]
    if NORM == LAYER_NORM:
        moments = [
            _moments(
                x_ptrs[number],
                change_ptrs[number],
                tl.arange(0, BLOCK_E),
                True,
                inputs.epsilon,
                E,
                NORM,
                BLOCK_E,
                STAGES,
            )
            for number in (0, 1, 2, 3)[:BLOCK_N]
        ]
    if inputs.squares is not None:
        # Loaded ahead of the weights, and not used before the loop ends.
        halves = [_squares(inputs, n[number]) for number in (0, 1, 2, 3)[:BLOCK_N]]
    BLOCK_M: tl.constexpr = weight_ptrs.shape[0]
    sums = [tl.zeros([BLOCK_M, BLOCK_E], tl.float32) for each in (0, 1, 2, 3)[:BLOCK_N]]
    squares = [tl.zeros([BLOCK_E], tl.float32) for each in (0, 1, 2, 3)[:BLOCK_N]]
    # Comprehension variables stay in scope: names inside the loop must differ from those outside.
    for first in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        e = first + tl.arange(0, BLOCK_E)
        is_real = None if E % BLOCK_E == 0 else e < E
        weight = numerics.load(
            weight_ptrs + e[None, :], None if is_real is None else is_real[None, :]
        )
        x = [read(x_ptrs[i], change_ptrs[i], e, is_real) for i in (0, 1, 2, 3)[:BLOCK_N]]
        if NORM == RMS_NORM:
            squares = [squares[i] + x[i] * x[i] for i in (0, 1, 2, 3)[:BLOCK_N]]
        if NORM != NO_NORM:
            gain = numerics.load(inputs.gain + e, is_real)
        if NORM == RMS_NORM:
            x = [x[i] * gain for i in (0, 1, 2, 3)[:BLOCK_N]]
        if NORM == LAYER_NORM:
            x = [(x[i] - moments[i][0]) * moments[i][1] * gain for i in (0, 1, 2, 3)[:BLOCK_N]]
            if inputs.shift is not None:
                shift = numerics.load(inputs.shift + e, is_real)
                x = [x[i] + shift for i in (0, 1, 2, 3)[:BLOCK_N]]
        sums = [sums[i] + weight * x[i][None, :] for i in (0, 1, 2, 3)[:BLOCK_N]]
    y = [tl.sum(each, axis=1) for each in sums]
    if NORM == RMS_NORM:
        y = [
            y[number] * tl.rsqrt(tl.sum(squares[number]) / E + inputs.epsilon)
            for number in (0, 1, 2, 3)[:BLOCK_N]
        ]
    if inputs.squares is not None:
        y = [
            y[number] * tl.rsqrt(tl.sum(halves[number]) + inputs.epsilon)
            for number in (0, 1, 2, 3)[:BLOCK_N]
        ]
    if BLOCK_N == 1:
        return y[0][:, None]
    elif BLOCK_N == 2:
        return tl.join(y[0], y[1])
    else:
        return tl.join(tl.join(y[0], y[2]), tl.join(y[1], y[3])).reshape(BLOCK_M, 4)


@triton.jit
def _tensor(
    weight_ptrs,
    x_ptr,
    inputs,
    start,
    rows,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    storage: tl.constexpr = weight_ptrs.dtype.element_ty
    # Rows that are rounded to fp16 need their statistics first; other dtypes have fp32's range.
    IS_APART: tl.constexpr = NORM == LAYER_NORM or (NORM == RMS_NORM and storage == tl.float16)
    n = start + tl.arange(0, BLOCK_N)
    inside = (n < rows)[:, None]
    n = tl.minimum(n, rows - 1)
    x_ptrs = x_ptr + (source(inputs.index, n) * inputs.stride)[:, None]
    change_ptrs = inputs.change
    if change_ptrs is not None:
        change_ptrs += n.to(tl.int64)[:, None] * inputs.change_stride
    if IS_APART:
        mean, scale = _moments(
            x_ptrs,
            change_ptrs,
            tl.arange(0, BLOCK_E)[None, :],
            inside,
            inputs.epsilon,
            E,
            NORM,
            BLOCK_E,
            STAGES,
        )
    # Kept through the product only if they take few registers.
    SQUARES_FIRST: tl.constexpr = inputs.squares is not None and BLOCK_N * inputs.sums <= 1024
    if SQUARES_FIRST:
        squares = _squares(inputs, n[:, None])
    y = tl.zeros([weight_ptrs.shape[0], BLOCK_N], tl.float32)
    if inputs.squares is None:
        squares = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for first in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        e = first + tl.arange(0, BLOCK_E)[None, :]
        is_real = None if E % BLOCK_E == 0 else e < E
        is_read = inside if is_real is None else inside & is_real
        weight = tl.load(weight_ptrs + e, mask=is_real, other=None if is_real is None else 0.0)
        if NORM == NO_NORM and inputs.change is None:
            operand = tl.load(x_ptrs + e, mask=is_read, other=0.0)
        else:
            x = read(x_ptrs, change_ptrs, e, is_read)
            if NORM != NO_NORM:
                gain = numerics.load(inputs.gain + e, is_real)
                if IS_APART:
                    x = (x - mean) * scale * gain
                else:
                    squares += x * x
                    x *= gain
                if inputs.shift is not None:
                    x += numerics.load(inputs.shift + e, is_real)
            operand = numerics.round_to(x, storage)
        y = numerics.dot(weight, tl.trans(operand), y)
    if NORM == RMS_NORM and not IS_APART:
        y *= tl.rsqrt(tl.sum(squares, axis=1) / E + inputs.epsilon)[None, :]
    if inputs.squares is not None:
        if not SQUARES_FIRST:
            squares = _squares(inputs, n[:, None])
        y *= tl.rsqrt(tl.sum(squares, axis=1) + inputs.epsilon)[None, :]
    return y


@triton.jit
def source(index_ptr, n):
    """The input rows that rows ``n`` read: int64."""
    if index_ptr is None:
        return n.to(tl.int64)
    else:
        return tl.load(index_ptr + n).to(tl.int64)


@triton.jit
def read(x_ptr, change_ptr, e, mask):
    """Elements ``e`` of ``x + change``, in fp32."""
    x = numerics.load(x_ptr + e, mask)
    if change_ptr is not None:
        x += numerics.load(change_ptr + e, mask)
    return x


@triton.jit
def _squares(inputs, n):
    """The half norm's parts of the mean squares of rows ``n``, along the last axis."""
    WIDTH: tl.constexpr = triton.next_power_of_2(inputs.sums)
    part = tl.arange(0, WIDTH)
    return tl.load(inputs.squares + n * inputs.sums + part, mask=part < inputs.sums, other=0.0)


@triton.jit
def _moments(
    x_ptrs,
    change_ptrs,
    e,
    inside,
    epsilon,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What to subtract from ``x + change`` and what to multiply by, broadcastable to its blocks."""
    shape: tl.constexpr = (x_ptrs + e).shape
    axis: tl.constexpr = len(shape) - 1
    mean = 0.0
    if NORM == LAYER_NORM:
        total = tl.zeros(shape, tl.float32)
        for first in tl.range(0, E, BLOCK_E, num_stages=STAGES):
            total += read(x_ptrs, change_ptrs, first + e, (first + e < E) & inside)
        mean = tl.sum(total, axis=axis, keep_dims=True) / E
    squares = tl.zeros(shape, tl.float32)
    for first in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        is_real = (first + e < E) & inside
        x = tl.where(is_real, read(x_ptrs, change_ptrs, first + e, is_real) - mean, 0.0)
        squares += x * x
    return mean, tl.rsqrt(tl.sum(squares, axis=axis, keep_dims=True) / E + epsilon)
