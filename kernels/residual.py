"""Second halves of sublayers: products that are added to the residual stream in place.

    add_terms_    h[index[n]] += factor * (sum of x[n] @ weight.T + bias, sum of changes[n])
    apply_terms   out[n] = x[n] @ weight.T + bias

``x [n, E]``, ``weight [M, E]``, ``bias [M]``, ``change [n, M]``, ``h [N, M]``. One or two terms in
one launch: a program computes the two terms of a sum one after the other, while two separate
results lie side by side on the grid. The whole sum is accumulated in fp32 and rounded once.

Grid of ``add_terms``: ``(n / BLOCK_N, M / BLOCK_M)``; adjacent programs share weights, so that all
but one find them in the L2 cache. Only one program reads and writes a tile of ``h``, so no copy is
needed. ``apply_terms`` has the terms as a third axis. The inner loops are those of ``products``.
Tuning tables: shape ``(M, E)``, with the ``E`` of the longer term.

Above ``splits.MOST_STREAMED`` rows tiles may be split (``splits``): ``SPLITS`` programs each, a
third axis.

With flags (``guards``) a term is added to the rows that run it, and its weights are read only if
there are any; a row that runs none keeps its bits. The grid is then ``(n / BLOCK_N, PROGRAMS)``,
and each program loops over tiles. Decisions on the new ``h`` may ride in the launch (``riding``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, hops, numerics, overlap, products, riding, splits
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    distance,
    product_candidates,
    weights_of,
    weights_step,
)
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import HalfNorm, Norm, Term
from fastskip.ops.hops import Field, Hops
from fastskip.ops.routes import Chosen, Route


class Addend(NamedTuple):
    """A term as passed to its kernel."""

    inputs: products.Inputs
    weights: products.Weights


class Change(NamedTuple):
    """A change ``[n, M]`` with dense rows."""

    ptr: Any
    stride: Any


class Half(NamedTuple):
    """The half norm that is left (``contracts.HalfNorm``): its weights ``gain [M]``, rows
    ``[n, M]`` and ``squares [n, tiles]``."""

    gain: Any
    rows: Any
    squares: Any


@triton.jit
def _term(
    term,
    m,
    start,
    rows,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    share=None,
):
    NORM: tl.constexpr = products.NO_NORM
    return products.product(
        term.weights,
        m,
        term.inputs,
        start,
        rows,
        E,
        NORM,
        BLOCK_N,
        BLOCK_E,
        STAGES,
        share=share,
    )


@triton.jit
def _chosen_term(
    does,
    does_any,
    term,
    m,
    start,
    rows,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``_term`` of the rows ``does [BLOCK_N]``, 0 for the others; no weights are read if there are
    none.

    ``does_any``: whether there are any. A single row comes without its axis: ``[BLOCK_M]``.
    """
    if BLOCK_N == 1:
        total = tl.zeros([m.shape[0]], tl.float32)
    else:
        total = tl.zeros([m.shape[0], BLOCK_N], tl.float32)
    if does_any:
        found = _term(term, m, start, rows, E, BLOCK_N, BLOCK_E, STAGES)
        total = tl.sum(found, axis=1) if BLOCK_N == 1 else tl.where(does[None], found, 0.0)
    return total


@triton.jit
def _add_tile(
    tile,
    n,
    gets,
    does,
    does_any,
    second_does,
    second_any,
    start,
    h_ptr,
    stride_hn,
    index_ptr,
    first,
    second,
    change,
    second_change,
    rows,
    factor,
    shared,
    half,
    M: tl.constexpr,
    E: tl.constexpr,
    SECOND_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds to the columns from ``tile * BLOCK_M`` on, for those rows ``n`` that ``gets`` marks.

    ``does``, ``second_does``, and whether any does: which rows each of two terms is for, or
    ``None`` if all terms are for all rows that get anything. With ``SPLITS`` a program sums its
    share of each term.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (m < M)[:, None] & gets[None]
    owned = tl.minimum(m, M - 1)
    row = n.to(tl.int64)
    if index_ptr is not None:
        row = tl.load(index_ptr + n, mask=n < rows, other=0).to(tl.int64)
    place_ptr = h_ptr + row[None] * stride_hn + m[:, None]
    if SPLITS == 1:
        # Loaded ahead of the products, and not used before they end.
        h = tl.load(place_ptr, mask=inside, other=0.0)
    if half is not None:
        gain = numerics.load(half.gain + owned)

    share = None
    if SPLITS > 1:
        share = tl.program_id(2)
    if does is None:
        total = _term(first, owned, start, rows, E // SPLITS, BLOCK_N, BLOCK_E, STAGES, share)
        if SECOND_E > 0:
            OTHER_E: tl.constexpr = SECOND_E // SPLITS
            other = _term(second, owned, start, rows, OTHER_E, BLOCK_N, BLOCK_E, STAGES, share)
            if BLOCK_N == 1:
                # Added before they become tiles: otherwise Triton 3.6 propagates the layout of the
                # weights to what follows, where each access would be repeated up to 64 times.
                total = (tl.sum(total, axis=1) + tl.sum(other, axis=1))[:, None]
            else:
                total += other
    else:
        total = _chosen_term(does, does_any, first, owned, start, rows, E, BLOCK_N, BLOCK_E, STAGES)
        total += _chosen_term(
            second_does, second_any, second, owned, start, rows, SECOND_E, BLOCK_N, BLOCK_E, STAGES
        )
        if BLOCK_N == 1:
            total = total[:, None]
    if SPLITS > 1:
        place = tl.program_id(0) * tl.num_programs(1) + tile
        total, goes_on = splits.put_together(total, shared, place, SPLITS)
        gets &= goes_on
        inside &= goes_on
        h = tl.load(place_ptr, mask=inside, other=0.0)
        # In a tile smaller than the program several threads load an element, and one stores it.
        tl.debug_barrier()
    if first.weights.bias is not None:
        total += _bias(first.weights.bias, owned, does)
    if SECOND_E > 0 and second.weights.bias is not None:
        total += _bias(second.weights.bias, owned, second_does)
    if change is not None:
        at = n.to(tl.int64)[None] * change.stride + m[:, None]
        total += numerics.load(change.ptr + at, inside)
    if second_change is not None:
        at = n.to(tl.int64)[None] * second_change.stride + m[:, None]
        total += numerics.load(second_change.ptr + at, inside)
    value = numerics.round_to(h.to(tl.float32) + factor * total, place_ptr.dtype.element_ty)
    tl.store(place_ptr, value, mask=inside)
    if half is not None:
        TILES: tl.constexpr = tl.cdiv(M, BLOCK_M)
        # From the rounded values, as if they were read back.
        value = tl.where(inside, value.to(tl.float32), 0.0)
        numerics.store(half.rows + row[None] * M + m[:, None], value * gain[:, None], inside)
        squares = tl.sum(value * value, axis=0) / M
        tl.store(half.squares + row * TILES + tile, squares, mask=gets)


@triton.jit
def _bias(bias_ptr, m, does):
    """``[BLOCK_M, 1]``, or, for the rows ``does [BLOCK_N]`` only, ``[BLOCK_M, BLOCK_N]``."""
    bias = numerics.load(bias_ptr + m)[:, None]
    if does is None:
        return bias
    else:
        return tl.where(does[None], bias, 0.0)


@triton.jit(do_not_specialize=["salts", "condition"])
def _add_terms_kernel(
    h_ptr,
    stride_hn,
    index_ptr,
    first,
    second,
    change,
    second_change,
    rows,
    factor,
    runs_ptr,
    second_runs_ptr,
    then,
    salts,
    now_ptr,
    loop,
    condition: tl.int64,
    shared,
    half,
    M: tl.constexpr,
    E: tl.constexpr,
    SECOND_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    MOVE: tl.constexpr,
    SCORES: tl.constexpr,
    RULES: tl.constexpr,
    IS_OF_ALL: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    FIELD: tl.constexpr,
    HOP: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
    READS_AHEAD: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    if OVERLAP and not READS_AHEAD:
        overlap.wait()
    # The launch that produced a term's x has already read these flags.
    gets = guards.flagged(runs_ptr, n, rows, READS_AHEAD)
    second_does = None
    if SECOND_E > 0:
        second_does = guards.flagged(second_runs_ptr, n, rows, READS_AHEAD)
    if OVERLAP and READS_AHEAD:
        overlap.wait()
    if now_ptr is not None:
        BITS: tl.constexpr = h_ptr.dtype.element_ty.primitive_bitwidth
        weights = first.weights
        # Inlined: a function cannot return a tuple whose fields may be None.
        weights = products.Weights(
            weights.weight + hops.distance(now_ptr, FIELD, BITS),
            weights.stride,
            None if weights.bias is None else weights.bias + tl.load(now_ptr + FIELD + 1),
        )
        first = Addend(first.inputs, weights)
    if runs_ptr is None and second_runs_ptr is None:
        _add_tile(
            tl.program_id(1),
            n,
            n < rows,
            None,
            None,
            None,
            None,
            start,
            h_ptr,
            stride_hn,
            index_ptr,
            first,
            second,
            change,
            second_change,
            rows,
            factor,
            shared,
            half,
            M,
            E,
            SECOND_E,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
            SPLITS,
        )
    else:
        # If no row gets anything the range is empty, but the program still reaches its end.
        TILES: tl.constexpr = tl.cdiv(M, BLOCK_M)
        does = None
        does_any = None
        second_any = None
        if SECOND_E > 0:
            does = gets
            does_any = guards.some(does)
            second_any = guards.some(second_does)
            gets = does | second_does
        begin = tl.where(guards.some(gets), 0, TILES)
        for tile in tl.range(
            begin + tl.program_id(1), TILES, tl.num_programs(1), disable_licm=True
        ):
            _add_tile(
                tile,
                n,
                gets,
                does,
                does_any,
                second_does,
                second_any,
                start,
                h_ptr,
                stride_hn,
                index_ptr,
                first,
                second,
                change,
                second_change,
                rows,
                factor,
                None,
                None,
                M,
                E,
                SECOND_E,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
                1,
            )
    if MOVE is not None:
        riding.ride(
            then,
            salts,
            h_ptr,
            stride_hn,
            start,
            rows,
            M,
            BLOCK_M,
            BLOCK_N,
            MOVE,
            SCORES,
            RULES,
            IS_OF_ALL,
            HAS_SUMS,
            ROWS,
            loop,
            condition,
            HOP,
        )


@triton.jit
def _apply_terms_kernel(
    first,
    step,
    out_ptr,
    stride_op,
    rows,
    M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2).to(tl.int64)
    inputs = products.Inputs(first.inputs.x + part * step.inputs.x, first.inputs.stride)
    weight_ptr = first.weights.weight + part * step.weights.weight
    weights = products.Weights(weight_ptr, first.weights.stride)
    owned = tl.minimum(m, M - 1)
    if OVERLAP:
        overlap.wait()
    total = _term(Addend(inputs, weights), owned, start, rows, E, BLOCK_N, BLOCK_E, STAGES)
    if first.weights.bias is not None:
        total += numerics.load(first.weights.bias + part * step.weights.bias + owned)[:, None]
    n = start + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < rows)[None]
    place_ptr = out_ptr + part * stride_op + n.to(tl.int64)[None] * M + m[:, None]
    numerics.store(place_ptr, total, inside)


def add_terms_(
    h: Tensor,
    terms: Sequence[Term],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] = (),
    factor: float = 1.0,
    chosen: Sequence[Chosen | None] = (),
    then: Route | None = None,
    field: Field | None = None,
    loop: Hops | None = None,
    condition: int = 0,
    arrivals: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """``h[index] += factor * (sum of x @ weight.T + bias + sum of changes)``, in place.

    ``h [N, M]``; one or two terms with ``x [n, E]`` each, ``E`` may differ; up to two changes
    ``[n, M]``. ``index [n]`` has no duplicates. ``chosen``: which rows each term is for, all if
    empty; not with ``index`` or ``changes``. ``then``: decisions on the new ``h``, if they
    ``riding.can_ride``; not with ``index``. ``arrivals``: as in ``splits``; tiles are split only
    with them, and never where rows are chosen or decisions ride. Returns ``h``.

    In a ``loop`` (``hops``) there is one term, that of its first layer; ``field`` says which of a
    layer's two. The one that ends a layer also chooses the next layer, and sets the ``condition``
    of the loop's node.
    """
    _launch_terms(
        h,
        terms,
        index=index,
        changes=changes,
        factor=factor,
        chosen=chosen,
        then=then,
        field=field,
        loop=loop,
        condition=condition,
        arrivals=arrivals,
        config=config,
    )
    return h


def add_terms_and_halve_(
    h: Tensor,
    terms: Sequence[Term],
    norm: Norm,
    *,
    factor: float = 1.0,
    arrivals: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> HalfNorm:
    """``add_terms_(h, terms)``, and the half of ``norm`` (which has one) for the new ``h``.

    Each program squares its own columns: a row's sum has as many parts as there are tiles.
    """
    half = _launch_terms(h, terms, norm=norm, factor=factor, arrivals=arrivals, config=config)
    assert half is not None
    return half


def _launch_terms(
    h: Tensor,
    terms: Sequence[Term],
    *,
    index: Tensor | None = None,
    changes: Sequence[Tensor] = (),
    factor: float = 1.0,
    chosen: Sequence[Chosen | None] = (),
    then: Route | None = None,
    field: Field | None = None,
    loop: Hops | None = None,
    condition: int = 0,
    arrivals: Tensor | None = None,
    norm: Norm | None = None,
    config: Mapping[str, Any] | None = None,
) -> HalfNorm | None:
    refuse_gradients(h=h, **{f"terms[{i}].x": term.x for i, term in enumerate(terms)})
    first, second = terms[0], terms[1] if len(terms) == 2 else None
    change, second_change = [*changes, None, None][:2]
    if len(terms) > 2 or len(changes) > 2:
        raise ValueError(
            f"terms, changes: {len(terms)}, {len(changes)}; allowed: 1 or 2 terms, 0 to 2 changes"
        )
    runs = [None if each is None else each.runs for each in chosen]
    is_guarded = any(each is not None for each in runs)
    if is_guarded and changes:
        raise ValueError("chosen: given with changes, which apply to all rows; pass only one")
    if then is not None and index is not None:
        raise ValueError("then: given with an index, but decides on all rows of h; pass only one")
    ends = loop if field is Field.DOWN else None
    if ends is not None:
        then = ends.route
    rows, size = len(first.x), h.shape[1]
    shape = size, max(term.x.shape[1] for term in terms)
    if is_guarded or then is not None or rows <= splits.MOST_STREAMED:
        arrivals = None
    over = guards.TABLE if is_guarded else None if arrivals is None else "add_terms_split"
    blocks, options = blocks_for("add_terms", config, h, rows, shape, over=over)
    is_streamed = blocks["BLOCK_N"] < 16 and options["num_warps"] <= 4
    if is_guarded and then is not None and (is_streamed or ends is not None):
        # Two programs per multiprocessor (one if it has many warps) have room for all registers;
        # left alone, ptxas would spill to make room for one more.
        options.setdefault("maxnreg", 255)
    tiles = triton.cdiv(size, blocks["BLOCK_M"])
    width = guards.width_of(blocks, rows, tiles, is_guarded=is_guarded)
    row_blocks = triton.cdiv(rows, blocks["BLOCK_N"])
    inner = [term.x.shape[1] for term in terms]
    shared = splits.arguments_of(blocks, arrivals, row_blocks * tiles, inner, h.device)
    half = None
    if norm is not None:
        squares = empty((rows, tiles), torch.float32, h.device)
        half = HalfNorm(norm, empty((rows, size), h.dtype, h.device), squares)
    launch(
        _add_terms_kernel,
        splits.grid_of((row_blocks, width), shared),
        options,
        is_guarded=is_guarded,
        h_ptr=h,
        stride_hn=h.stride(0),
        index_ptr=index,
        first=_addend(first),
        second=second and _addend(second),
        change=_change(change),
        second_change=_change(second_change),
        rows=rows,
        factor=float(factor),
        runs_ptr=runs[0] if runs else None,
        second_runs_ptr=runs[1] if len(runs) == 2 else None,
        now_ptr=None if loop is None else loop.now,
        half=half and Half(half.norm.weight, half.rows, half.squares),
        **shared,
        FIELD=None if field is None else field.value,
        M=size,
        E=first.x.shape[1],
        SECOND_E=second.x.shape[1] if second else 0,
        **riding.carried(then, h, tiles),
        **riding.hopping(ends, condition),
        **blocks,
    )
    return half


def apply_terms(terms: Sequence[Term], *, config: Mapping[str, Any] | None = None) -> list[Tensor]:
    """``x @ weight.T + bias`` of each term: ``[n, E] -> [n, M]``.

    Two terms with the same layout share a launch; others take one each.
    """
    refuse_gradients(**{f"terms[{i}].x": term.x for i, term in enumerate(terms)})
    if len(terms) > 1 and (len(terms) > 2 or _layout(terms[0]) != _layout(terms[1])):
        return [apply_terms([term], config=config)[0] for term in terms]
    first = terms[0]
    (rows, inner), (size, _) = first.x.shape, first.linear.weight.shape
    out = empty((len(terms), rows, size), first.x.dtype, first.x.device)
    blocks, options = blocks_for("apply_terms", config, first.x, rows, (size, inner))
    grid = triton.cdiv(rows, blocks["BLOCK_N"]), triton.cdiv(size, blocks["BLOCK_M"])
    launch(
        _apply_terms_kernel,
        (*grid, len(terms)),
        options,
        first=_addend(first),
        step=Addend(
            products.Inputs(distance([term.x for term in terms]), 0),
            weights_step([term.linear for term in terms]),
        ),
        out_ptr=out,
        stride_op=out.stride(0),
        rows=rows,
        M=size,
        E=inner,
        **blocks,
    )
    return list(out)


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing, for either kernel; ``shape`` as in the tables.

    The widest blocks are left out where they would leave many multiprocessors idle.
    """
    found = [
        {name: value for name, value in config.items() if name != "NORM_APART"}
        for config in product_candidates(rows)
        if not config.get("NORM_APART") and shape[0] >= 64 * config["BLOCK_M"]
    ]
    return found or product_candidates(rows)[:1]


def _addend(term: Term) -> Addend:
    return Addend(products.Inputs(term.x, term.x.stride(0)), weights_of(term.linear))


def _change(change: Tensor | None) -> Change | None:
    return None if change is None else Change(change, change.stride(0))


def _layout(term: Term) -> tuple[Any, ...]:
    """What two terms must have in common so that only their addresses differ."""
    weight = term.linear.weight
    return term.x.shape, term.x.stride(), weight.shape, weight.stride(), term.linear.bias is None
