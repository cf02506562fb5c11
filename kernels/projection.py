"""Norm, QKV product, RoPE and the append to the cache in one launch, for few rows.

    y = norm(h[index]) @ weight.T + bias                       heads [n, H + 2G, K]
    queries, keys: elements i and i + K/2 of a head are rotated together; values are not rotated

``h [N, D]``, ``weight [(H + 2G) * K, D]``, ``cosine``, ``sine [positions, K / 2]``; the queries go
to ``out [n, H, K]``, keys and values to their slots: head ``e`` of the ``2G`` at
``table[sequence, slot // PAGE] + offset + (e * PAGE + slot % PAGE) * K``. A row whose slot is
negative leaves no entry.

A program owns ``BLOCK_M / 2`` pairs ``(i, i + K/2)``, counted across all heads, so that any head
dim fits any block. Grid ``(n / BLOCK_N, parts * pairs / (BLOCK_M / 2))``, where a pair of blocks
makes two parts; adjacent programs share weights, so that all but one find them in the L2 cache.
Tuning table: ``project_append``, shape ``((H + 2G) * K, D)``. With ``LONG`` in a configuration the
grid has that many persistent programs (``operands.share_out``).

With flags (``guards``) queries are computed for the rows that run, and entries for these or for all
rows; tiles that no row needs are skipped. The grid is then ``(n / BLOCK_N, PROGRAMS)``, and each
program loops over tiles.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import guards, hops, numerics, overlap, products, splits
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    distance,
    half_candidates,
    kind_of,
    product_candidates,
    rows_read,
    share_out,
    weights_of,
    weights_step,
)
from fastskip.kernels.rotary import rotate
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE as PAGE_SLOTS
from fastskip.ops.contracts import HalfNorm, Projection
from fastskip.ops.routes import Chosen

PAGE = tl.constexpr(PAGE_SLOTS)


class Heads(NamedTuple):
    """How heads are rotated, ``None`` if they are not, and where their entries go, ``None`` if
    there are none."""

    cosine: Any
    sine: Any
    positions: Any
    angle_stride: Any
    anchor: Any
    table: Any
    table_stride: Any
    sequences: Any
    slots: Any
    offset: Any


@triton.jit
def head_rows(
    tile,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Weight rows ``[BLOCK_M]`` of a tile of heads, clamped to the weight."""
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = (QUERIES + 2 * GROUPS) * HALF
    pair = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    return products.pair_rows(tl.minimum(pair, PAIRS - 1), HALF, HALF)


@triton.jit
def entries_of(n, leaves, heads, HEAD_DIM: tl.constexpr):
    """Pointers to where the entry of each row ``n`` begins, and which rows leave one.

    ``leaves [N]``: rows that leave one if they have a slot.
    """
    slot = tl.load(heads.slots + n, mask=leaves, other=-1)
    is_kept = slot >= 0
    sequence = tl.load(heads.sequences + n, mask=is_kept, other=0).to(tl.int64)
    page = heads.table + sequence * heads.table_stride + slot // PAGE
    start = tl.load(page, mask=is_kept, other=0)
    return heads.anchor + start + heads.offset + slot % PAGE * HEAD_DIM, is_kept


@triton.jit
def angles_of(pair, position, inside, heads, HALF: tl.constexpr, TURNING: tl.constexpr):
    """Cosines and sines of pairs ``[P]`` for the rows ``inside [N]``: ``[P, N]``.

    Only the first ``TURNING`` heads are rotated.
    """
    angle = position[None, :] * heads.angle_stride + (pair % HALF)[:, None]
    is_read = (pair < TURNING * HALF)[:, None] & inside[None, :]
    return numerics.load(heads.cosine + angle, is_read), numerics.load(heads.sine + angle, is_read)


@triton.jit
def turn(first, second, pair, cosine, sine, HALF: tl.constexpr, TURNING: tl.constexpr):
    """RoPE of pairs ``[P, N]``; heads from ``TURNING`` on are left unchanged."""
    does_turn = (pair < TURNING * HALF)[:, None]
    turned_first, turned_second = rotate(first, second, cosine, sine)
    return tl.where(does_turn, turned_first, first), tl.where(does_turn, turned_second, second)


@triton.jit
def store_heads(
    first,
    second,
    pair,
    n,
    asks,
    out_ptr,
    entry_ptr,
    is_kept,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Stores queries to ``out [n, H, K]``, keys and values to the entries that begin at
    ``entry_ptr``.

    ``asks``, ``is_kept [N]``: the rows that have queries, and those that leave entries.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    head = pair // HALF
    element = pair % HALF
    if QUERIES > 0:
        query_ptr = out_ptr + n.to(tl.int64) * (QUERIES * HEAD_DIM)
        query_ptr = query_ptr[None, :] + (head * HEAD_DIM + element)[:, None]
        is_written = (head < QUERIES)[:, None] & asks[None, :]
        numerics.store(query_ptr, first, is_written)
        numerics.store(query_ptr + HALF, second, is_written)
    if GROUPS > 0:
        entry_ptr = entry_ptr[None, :] + ((head - QUERIES) * (PAGE * HEAD_DIM) + element)[:, None]
        is_entry = (head >= QUERIES) & (head < QUERIES + 2 * GROUPS)
        is_written = is_entry[:, None] & is_kept[None, :]
        numerics.store(entry_ptr, first, is_written)
        numerics.store(entry_ptr + HALF, second, is_written)


@triton.jit
def chosen_tiles(
    runs_ptr,
    n,
    rows,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEAVES_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The tiles of heads that rows ``n [N]`` need, as first and end, and which rows have queries
    and which leave entries.

    Tiles of queries come first. Rows that run have queries; unless all rows leave entries, only
    they do.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    TILES: tl.constexpr = tl.cdiv((QUERIES + 2 * GROUPS) * HALF, BLOCK_M // 2)
    IDLE: tl.constexpr = QUERIES * HALF // (BLOCK_M // 2) if LEAVES_ALL and GROUPS > 0 else TILES
    asks = guards.flagged(runs_ptr, n, rows)
    begin = tl.where(guards.some(asks), 0, IDLE)
    return begin, TILES, asks, n < rows if LEAVES_ALL else asks


@triton.jit
def _project_tile(
    tile,
    start,
    n,
    asks,
    leaves,
    part,
    inputs,
    inputs_step,
    weights,
    heads,
    out_ptr,
    rows,
    shared,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The heads of ``BLOCK_M / 2`` pairs: queries of the rows ``asks [BLOCK_N]``, and entries of
    the rows ``leaves`` that have a slot; or this program's share of them."""
    HALF: tl.constexpr = HEAD_DIM // 2
    TURNING: tl.constexpr = QUERIES + GROUPS
    # Kept through the product only if they take few registers.
    ANGLES_FIRST: tl.constexpr = BLOCK_M * BLOCK_N <= 1024
    pair = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    m = head_rows(tile, QUERIES, GROUPS, HEAD_DIM, BLOCK_M)
    inside = n < rows
    # Loads for the epilogue are issued before the product, so that the latencies overlap.
    bias = None
    if weights.bias is not None:
        bias = numerics.load(weights.bias + m)[:, None]
    position = None
    cosine = None
    sine = None
    if heads.cosine is not None:
        position = tl.load(heads.positions + n, mask=inside, other=0).to(tl.int64)
        if ANGLES_FIRST:
            cosine, sine = angles_of(pair, position, inside, heads, HALF, TURNING)
    entry_ptr = None
    is_kept = None
    if GROUPS > 0:
        entry_ptr, is_kept = entries_of(n, leaves, heads, HEAD_DIM)
    y = products.product(
        weights,
        m,
        inputs,
        start,
        rows,
        D // SPLITS,
        NORM,
        BLOCK_N,
        BLOCK_E,
        STAGES,
        part,
        inputs_step,
        tl.program_id(2) if SPLITS > 1 else None,
    )
    if SPLITS > 1:
        place = tl.program_id(0) * tl.num_programs(1) + tile
        y, goes_on = splits.put_together(y, shared, place, SPLITS)
        asks &= goes_on
        if GROUPS > 0:
            is_kept &= goes_on
    if bias is not None:
        y += bias
    first, second = products.split_pairs(y)
    if heads.cosine is not None:
        if cosine is None:
            cosine, sine = angles_of(pair, position, inside, heads, HALF, TURNING)
        first, second = turn(first, second, pair, cosine, sine, HALF, TURNING)
    store_heads(
        first, second, pair, n, asks, out_ptr, entry_ptr, is_kept, QUERIES, GROUPS, HEAD_DIM
    )


@triton.jit
def _project_append_kernel(
    inputs,
    inputs_step,
    weights,
    weights_step,
    heads,
    heads_step,
    runs_ptr,
    now_ptr,
    out_ptr,
    rows,
    shared,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    LEAVES_ALL: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_LONG: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    part = None
    if PARTS == 2:
        tiles = tl.num_programs(1) // 2
        part = (tile // tiles).to(tl.int64)
        tile %= tiles
        out_ptr += part * rows * (QUERIES * HEAD_DIM)
    if OVERLAP:
        overlap.wait()
    if now_ptr is not None:
        # Like the second block of a pair, but with distances read on the device.
        BITS: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth
        part = 1
        inputs_step = hops.norm_step(now_ptr, hops.ATTENTION_GAIN, BITS)
        weights_step = hops.weights_step(now_ptr, hops.QKV, BITS)
        heads_step = Heads(
            0,
            0,
            0,
            0,
            0,
            tl.load(now_ptr + hops.TABLE),
            0,
            0,
            tl.load(now_ptr + hops.COUNTS),
            hops.distance(now_ptr, hops.OFFSET, BITS),
        )
    if part is not None:
        # Inlined: a function cannot return a tuple whose fields may be None.
        weights = products.Weights(
            weights.weight + part * weights_step.weight,
            weights.stride,
            None if weights.bias is None else weights.bias + part * weights_step.bias,
        )
        heads = Heads(
            None if heads.cosine is None else heads.cosine + part * heads_step.cosine,
            None if heads.sine is None else heads.sine + part * heads_step.sine,
            None if heads.positions is None else heads.positions + part * heads_step.positions,
            heads.angle_stride,
            None if heads.anchor is None else heads.anchor + part * heads_step.anchor,
            None if heads.table is None else heads.table + part * heads_step.table,
            heads.table_stride,
            None if heads.sequences is None else heads.sequences + part * heads_step.sequences,
            None if heads.slots is None else heads.slots + part * heads_step.slots,
            heads.offset + part * heads_step.offset,
        )

    if runs_ptr is None and not IS_LONG:
        _project_tile(
            tile,
            start,
            n,
            n < rows,
            n < rows,
            part,
            inputs,
            inputs_step,
            weights,
            heads,
            out_ptr,
            rows,
            shared,
            D,
            QUERIES,
            GROUPS,
            HEAD_DIM,
            NORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
            SPLITS,
        )
    else:
        begin, end, asks, leaves = chosen_tiles(
            runs_ptr, n, rows, QUERIES, GROUPS, HEAD_DIM, LEAVES_ALL, BLOCK_M
        )
        for number in tl.range(
            begin + tile, end, tl.num_programs(1), disable_licm=not IS_LONG, flatten=IS_LONG
        ):
            _project_tile(
                number,
                start,
                n,
                asks,
                leaves,
                part,
                inputs,
                inputs_step,
                weights,
                heads,
                out_ptr,
                rows,
                None,
                D,
                QUERIES,
                GROUPS,
                HEAD_DIM,
                NORM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
                1,
            )


def project_append(
    h: Tensor,
    projections: Sequence[Projection],
    *,
    index: Tensor | None = None,
    chosen: Chosen | None = None,
    now: Tensor | None = None,
    half: HalfNorm | None = None,
    arrivals: Tensor | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Norm, product, RoPE and K/V append, of one block or of the two blocks of a pair.

    Returns the rotated queries of each, ``[n, H, K]`` (``H`` may be 0). A pair takes one launch if
    its blocks have the same shape and run for all rows. ``chosen``: the rows that run, not with
    ``index``; the others leave entries if the projection ``leaves_all``. ``now``: inside a loop
    (``hops``), the distances from the given tensors, those of its first layer, to those of the next
    layer; new entries go to the slots that the next layer's counts name. ``half``: the half norm of
    all rows, if already taken; only then may tiles be split, with ``arrivals`` (``splits``).
    """
    refuse_gradients(h=h)
    first, last = projections[0], projections[-1]
    if len(projections) > 1 and (chosen is not None or _kind(first) != _kind(last)):
        return [
            found
            for each in projections
            for found in project_append(h, [each], index=index, chosen=chosen, config=config)
        ]
    rows, parts = len(h) if index is None else len(index), len(projections)
    linear, size, queries = first.linear, first.head_dim, first.heads
    shape = (linear.weight.shape[0], linear.weight.shape[1])
    is_guarded = chosen is not None
    over = guards.TABLE if is_guarded else None if half is None else "project_append_half"
    if half is None or rows <= splits.MOST_STREAMED:
        arrivals = None
    blocks, options = blocks_for("project_append", config, h, rows, shape, over=over)
    if now is not None and blocks["BLOCK_N"] >= 16 and options["num_warps"] <= 4:
        # A loop keeps addresses in registers, which ptxas would otherwise spill.
        options.setdefault("maxnreg", 255)
    is_apart = bool(blocks.pop("NORM_APART", False)) and now is None
    out = empty((parts, rows, queries, size), h.dtype, h.device)
    tiles = parts * triton.cdiv(shape[0] // 2, blocks["BLOCK_M"] // 2)
    row_blocks = triton.cdiv(rows, blocks["BLOCK_N"])
    shared = splits.arguments_of(blocks, arrivals, row_blocks * tiles, [shape[1]], h.device)
    width = guards.width_of(blocks, rows, tiles, is_guarded=is_guarded)
    width, is_long = share_out(blocks, tiles, width, may_be_long=parts == 1)
    norms = [each.norm for each in projections]
    x = rows_read(h, norms, index=index, is_apart=is_apart, half=half)
    launch(
        _project_append_kernel,
        splits.grid_of((row_blocks, width), shared),
        options,
        is_guarded=is_guarded,
        inputs=x.first,
        inputs_step=x.step,
        weights=weights_of(linear),
        weights_step=weights_step([each.linear for each in projections]),
        **head_arguments(first),
        heads_step=_steps(heads_of(first), heads_of(last)),
        runs_ptr=None if chosen is None else chosen.runs,
        now_ptr=now,
        out_ptr=out,
        rows=rows,
        **shared,
        D=shape[1],
        PARTS=parts,
        LEAVES_ALL=chosen is None or first.leaves_all,
        NORM=x.form,
        IS_LONG=is_long,
        **blocks,
    )
    return list(out)


def heads_of(projection: Projection) -> Heads:
    """How heads are rotated and where they go."""
    targets, pages, rotation = projection.targets, projection.pages, projection.rotation
    return Heads(
        cosine=None if rotation is None else rotation.cosine,
        sine=None if rotation is None else rotation.sine,
        positions=None if rotation is None else targets.positions,
        angle_stride=0 if rotation is None else rotation.cosine.stride(0),
        anchor=None if pages is None else pages.anchor,
        table=None if pages is None else pages.table,
        table_stride=0 if pages is None else pages.table.stride(0),
        sequences=None if pages is None else targets.sequences,
        slots=None if pages is None else targets.slots,
        offset=0 if pages is None else pages.offset,
    )


def head_arguments(projection: Projection) -> dict[str, Any]:
    """The kernel arguments that describe the heads."""
    return {
        "heads": heads_of(projection),
        "QUERIES": projection.heads,
        "GROUPS": 0 if projection.pages is None else projection.pages.groups,
        "HEAD_DIM": projection.head_dim,
    }


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing."""
    return product_candidates(rows, may_be_long=True)


def project_append_half_candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """For rows of a half norm, with whole tiles and with split ones."""
    return half_candidates(rows) + splits.step_candidates(rows, (shape[0], shape[1]))


def _steps(first: Heads, last: Heads) -> Heads:
    """Elements from each tensor of the first problem to that of the last."""
    steps = {
        name: distance([one, getattr(last, name)]) if isinstance(one, Tensor) else 0
        for name, one in first._asdict().items()
    }
    return Heads(**{**steps, "offset": last.offset - first.offset})


def _kind(projection: Projection) -> Hashable:
    arguments = head_arguments(projection)
    heads = arguments.pop("heads")
    given = tuple(value is None for value in heads)
    sizes = heads.angle_stride, heads.table_stride, *arguments.values()
    has_bias = projection.linear.bias is not None
    return given, sizes, has_bias, kind_of(projection.norm, projection.linear)
