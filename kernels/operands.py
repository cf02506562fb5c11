"""What the launchers of the fused products share: blocks, input rows, and pairs of problems.

The second problem of a launch is passed to the kernel as distances: the elements from each tensor
of the first to the same tensor of the second. The compiler still knows the alignment of a pointer
plus a distance; of a pointer loaded at run time it knows nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import products, tuning
from fastskip.kernels.blocks import split
from fastskip.kernels.norm import normalize
from fastskip.ops.contracts import HalfNorm, Linear, Norm, elements_between


def distance(tensors: Sequence[Tensor | None]) -> int:
    """Elements from the first tensor to the last; 0 if either is missing or holds no data."""
    first, last = (tensors[0], tensors[-1]) if tensors else (None, None)
    if first is None or last is None:
        return 0
    return elements_between(first, last)


def kind_of(norm: Norm, linear: Linear) -> Hashable:
    """What two problems must have in common to share a launch."""
    sizes = linear.weight.shape[1], linear.weight.stride(0)
    return norm.is_centred, norm.epsilon, norm.bias is None, sizes


def blocks_for(
    name: str,
    config: Mapping[str, Any] | None,
    x: Tensor,
    rows: int,
    shape: tuple[int, int],
    *,
    over: str | None = None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and options of a product of ``shape``, (out, in) features, on ``rows`` rows: from
    ``config``, else from the kernel's table, overridden by the table ``over``.

    Tables count ``BLOCK_E`` in 2-byte elements; wider elements get half as many. No block is much
    wider than a row. fp32 always uses the streaming form: matrix instructions would round it.
    """
    chosen = config or tuning.config_over(name, over, x.device, rows, shape)
    blocks, options = split(chosen)
    if x.element_size() > 2 and blocks["BLOCK_N"] > 4:
        blocks |= {"BLOCK_M": 8, "BLOCK_N": 4, "BLOCK_E": 256}
    width = min(blocks["BLOCK_E"] * 2 // x.element_size(), triton.next_power_of_2(shape[1]))
    return {**blocks, "BLOCK_E": max(16, width)}, options


def share_out(
    blocks: dict[str, int], tiles: int, programs: int, *, may_be_long: bool
) -> tuple[int, bool]:
    """How many programs compute ``tiles`` of a product, and whether they are persistent: just
    enough to fill the multiprocessors, each with several tiles and loads pipelined across them.

    ``programs``: how many there are otherwise. ``LONG``, the number of persistent ones, is removed
    from ``blocks``.
    """
    long = blocks.pop("LONG", 0)
    if not long or not may_be_long or long >= tiles:
        return programs, False
    return long, True


def rows_read(
    h: Tensor,
    norms: Sequence[Norm],
    *,
    index: Tensor | None,
    changes: Sequence[Tensor] | None = None,
    is_apart: bool,
    half: HalfNorm | None = None,
) -> RowsRead:
    """The inputs of a launch: ``norm(h[index] + change)`` of each problem, or, without ``norms``,
    rows as they are.

    ``is_apart``: the norm has its own launches, one per distinct norm or change, and the product
    reads normalised rows. ``half``: the half norm of all rows of ``h``, without changes, if already
    taken; it needs no launch.
    """
    if half is not None:
        if len(norms) != 1 or index is not None or changes is not None:
            raise ValueError("half: allowed only with one norm, over all rows, without changes")
        return RowsRead([half.rows], None, None, None, half)
    if not is_apart or not norms:
        return RowsRead([h], index, changes, norms or None)
    inputs = [
        normalize(h, norm, index=index, change=None if changes is None else changes[number])
        for number, norm in enumerate(norms)
        if number == 0
        or changes is not None
        or norm.weight is not norms[0].weight
        or norm.bias is not norms[0].bias
    ]
    return RowsRead(inputs, None, None, None)


@dataclass(frozen=True, slots=True)
class RowsRead:
    """What the problems of a launch read; must stay alive until the launch is made."""

    inputs: Sequence[Tensor]
    index: Tensor | None
    changes: Sequence[Tensor] | None
    norms: Sequence[Norm] | None
    half: HalfNorm | None = None

    @property
    def form(self) -> int:
        """The norm that the product itself applies."""
        if self.norms is None:
            return int(products.NO_NORM.value)
        is_centred = self.norms[0].is_centred
        return int((products.LAYER_NORM if is_centred else products.RMS_NORM).value)

    @property
    def first(self) -> products.Inputs:
        """The inputs of the first problem."""
        x, change = self.inputs[0], None if self.changes is None else self.changes[0]
        norm = None if self.norms is None else self.norms[0]
        if self.half is not None:
            squares = self.half.squares
            return products.Inputs(
                x=x,
                stride=x.stride(0),
                epsilon=self.half.norm.epsilon,
                squares=squares,
                sums=tl.constexpr(squares.shape[1]),
            )
        return products.Inputs(
            x=x,
            stride=x.stride(0),
            index=self.index,
            change=change,
            change_stride=0 if change is None else change.stride(0),
            gain=norm and norm.weight,
            shift=norm and norm.bias,
            epsilon=norm.epsilon if norm else 0.0,
        )

    @property
    def step(self) -> products.Inputs:
        """Elements from each tensor of the first problem to that of the last."""
        norms = self.norms or ()
        return products.Inputs(
            x=distance(self.inputs),
            stride=0,
            change=distance(self.changes or ()),
            gain=distance([each.weight for each in norms]),
            shift=distance([each.bias for each in norms]),
        )


def weights_of(linear: Linear) -> products.Weights:
    """The weights of a problem as passed to its kernel."""
    return products.Weights(linear.weight, linear.weight.stride(0), linear.bias)


def weights_step(linears: Sequence[Linear]) -> products.Weights:
    """Elements from the tensors of the first problem to those of the last."""
    weight, bias = [each.weight for each in linears], [each.bias for each in linears]
    return products.Weights(distance(weight), 0, distance(bias))


def product_candidates(rows: int, *, may_be_long: bool = False) -> list[dict[str, int]]:
    """Configurations worth timing for a product of few rows: bytes in flight against launch width.

    In the streaming form a tile is 2 to 32 KB, pipelined through shared memory or, with one stage,
    held by many small programs; ``may_be_long`` adds a few persistent programs (``share_out``). In
    the tensor form the choice is between WGMMA (at least 64 weight rows) and narrower tiles, and
    between a fused norm and a separate one.
    """
    found = []
    if rows <= 4:
        block = triton.next_power_of_2(max(rows, 1))
        found += [
            _blocks(m, block, e, stages, warps)
            for m, e, stages, warps in _STREAM_TILES
            # One accumulator per row: at most 64 registers for all of them.
            if m * e * block <= 64 * 32 * warps
        ]
        found += [
            {**_blocks(m, block, e, stages, warps), "LONG": programs}
            for m, e, stages, warps in (_LONG_TILES if may_be_long and rows == 1 else ())
            for programs in (264, 396, 528)
        ]
    if rows > 1:
        block = min(64, max(16, triton.next_power_of_2(rows)))
        found += [
            {**_blocks(m, block, e, stages, warps), "NORM_APART": is_apart}
            for m, e, stages, warps in (_TENSOR_TILES[:5] if found else _TENSOR_TILES)
            for is_apart in (0, 1)
            # A fused norm passes rows through registers: at most 64 elements per thread.
            if (m + block) * e * 2 * stages <= 216 << 10
            and (is_apart or block * e <= 64 * 32 * warps)
        ]
    return found


def half_candidates(rows: int) -> list[dict[str, int]]:
    """The same for products that read rows of a half norm. They override the kernel's own table, so
    they also set what only that one may name (``LONG``)."""
    found = [
        {"LONG": 0} | {name: value for name, value in config.items() if name != "NORM_APART"}
        for config in product_candidates(rows, may_be_long=True)
    ]
    return [config for number, config in enumerate(found) if config not in found[:number]]


_STREAM_TILES = (
    (2, 2048, 1, 2),
    (2, 2048, 1, 4),
    (2, 4096, 1, 4),
    (4, 256, 6, 4),
    (4, 512, 1, 2),
    (4, 512, 1, 4),
    (4, 1024, 1, 2),
    (4, 1024, 1, 4),
    (4, 1024, 3, 4),
    (4, 2048, 1, 4),
    (4, 2048, 2, 4),
    (4, 4096, 1, 8),
    (8, 256, 1, 2),
    (8, 256, 4, 4),
    (8, 256, 6, 4),
    (8, 256, 8, 4),
    (8, 512, 1, 2),
    (8, 512, 1, 4),
    (8, 512, 2, 4),
    (8, 512, 3, 4),
    (8, 512, 4, 4),
    (8, 512, 6, 4),
    (8, 1024, 1, 4),
    (8, 1024, 2, 4),
    (8, 1024, 3, 4),
    (8, 1024, 4, 8),
    (8, 2048, 1, 8),
    (16, 128, 6, 4),
    (16, 256, 1, 4),
    (16, 256, 3, 4),
    (16, 256, 4, 4),
    (16, 256, 6, 4),
    (16, 256, 8, 4),
    (16, 512, 1, 4),
    (16, 512, 4, 4),
    (16, 512, 4, 8),
    (32, 128, 4, 4),
    (32, 128, 8, 4),
    (32, 256, 3, 8),
    (32, 256, 4, 8),
    (64, 64, 8, 4),
    (64, 128, 3, 4),
    (64, 128, 4, 4),
    (64, 128, 4, 8),
)
_LONG_TILES = (
    (8, 256, 4, 4),
    (8, 256, 6, 4),
    (8, 512, 4, 4),
    (16, 256, 4, 4),
)
_TENSOR_TILES = (
    (16, 256, 4, 4),
    (32, 128, 5, 4),
    (64, 128, 3, 4),
    (64, 128, 4, 4),
    (64, 256, 3, 4),
    (16, 128, 6, 4),
    (16, 128, 8, 4),
    (16, 256, 3, 4),
    (16, 256, 6, 4),
    (32, 128, 8, 4),
    (32, 256, 3, 4),
    (32, 256, 4, 4),
    (32, 256, 5, 4),
    (32, 256, 4, 8),
    (64, 64, 4, 4),
    (64, 64, 6, 4),
    (64, 64, 8, 4),
    (64, 128, 6, 4),
    (64, 256, 4, 4),
    (128, 64, 4, 8),
    (128, 64, 6, 8),
    (128, 128, 3, 8),
    (128, 128, 4, 8),
)


def _blocks(m: int, n: int, e: int, stages: int, warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_E": e, "STAGES": stages, "num_warps": warps}
