"""What the launchers of the fused products share: blocks, input rows, and two problems at once.

The second problem of a launch is told to the kernel as distances: elements from a tensor of the
first to the same tensor of the second. A pointer plus a distance keeps what is known of its
alignment, which a pointer loaded at run time does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from fastskip.kernels import products, tuning
from fastskip.kernels.blocks import split
from fastskip.kernels.norm import normalize
from fastskip.ops.contracts import Linear, Norm


def distance(tensors: Sequence[Tensor | None]) -> int:
    """Elements from the first tensor to the last; 0 for none and for tensors without data."""
    first, last = tensors[0], tensors[-1]
    if first is None or last is None:
        return 0
    return (last.data_ptr() - first.data_ptr()) // first.element_size()


def kind_of(norm: Norm, linear: Linear) -> Hashable:
    """What must agree of two problems that share a launch."""
    sizes = linear.weight.shape[1], linear.weight.stride(0)
    return norm.is_centred, norm.epsilon, norm.bias is None, sizes


def blocks_for(
    name: str, config: Mapping[str, Any] | None, x: Tensor, rows: int, shape: tuple[int, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and options of a product of ``shape``, (out, in) features, on ``rows`` rows.

    Tables count ``BLOCK_E`` in elements of two bytes; wider ones go by half as many at a time. No
    block is much wider than a row.
    """
    chosen = config or tuning.config_for(name, x.device, rows, shape)
    blocks, options = split(chosen)
    width = min(blocks["BLOCK_E"] * 2 // x.element_size(), triton.next_power_of_2(shape[1]))
    return {**blocks, "BLOCK_E": max(16, width)}, options


def rows_read(
    h: Tensor,
    norms: Sequence[Norm],
    *,
    index: Tensor | None,
    changes: Sequence[Tensor] | None = None,
    is_apart: bool,
) -> RowsRead:
    """``norm(h[index] + change)`` of each problem.

    ``is_apart``: the norm takes launches of its own, one for each that differs, and the product
    finds finished rows.
    """
    if not is_apart:
        return RowsRead([h], index, changes, norms)
    inputs = [
        normalize(h, norm, index=index, change=None if changes is None else changes[number])
        for number, norm in enumerate(norms)
        if number == 0 or changes is not None or norm.weight is not norms[0].weight
    ]
    return RowsRead(inputs, None, None, None)


@dataclass(frozen=True, slots=True)
class RowsRead:
    """What the problems of a launch read; it must outlive the launch."""

    inputs: Sequence[Tensor]
    index: Tensor | None
    changes: Sequence[Tensor] | None
    norms: Sequence[Norm] | None

    @property
    def arguments(self) -> dict[str, Any]:
        """What the kernel is told of it."""
        changes, norms = self.changes, self.norms
        form = products.NO_NORM
        if norms is not None:
            form = products.LAYER_NORM if norms[0].is_centred else products.RMS_NORM
        return {
            "x_ptr": self.inputs[0],
            "stride_xn": self.inputs[0].stride(0),
            "x_distance": distance(self.inputs),
            "index_ptr": self.index,
            "change_ptr": None if changes is None else changes[0],
            "stride_cn": 0 if changes is None else changes[0].stride(0),
            "change_distance": 0 if changes is None else distance(changes),
            "gain_ptr": None if norms is None else norms[0].weight,
            "gain_distance": 0 if norms is None else distance([each.weight for each in norms]),
            "shift_ptr": None if norms is None else norms[0].bias,
            "shift_distance": 0 if norms is None else distance([each.bias for each in norms]),
            "epsilon": 0.0 if norms is None else norms[0].epsilon,
            "NORM": form.value,
        }


def product_candidates(rows: int) -> list[dict[str, int]]:
    """Configurations worth timing for a product of few rows: bytes in flight against launch width.

    In the streaming form a tile is 4 to 32 KB and one to five are on their way; in the tensor form
    WGMMA (64 weight rows and more) stands against narrower tiles with ``mma.sync``.
    """
    if rows <= 4:
        block = triton.next_power_of_2(max(rows, 1))
        return [
            {"BLOCK_M": m, "BLOCK_N": block, "BLOCK_E": e, "STAGES": stages, "num_warps": warps}
            for m, e, stages, warps in (
                (8, 256, 4, 4),
                (8, 256, 5, 4),
                (8, 512, 1, 4),
                (8, 512, 4, 4),
                (8, 1024, 1, 4),
                (8, 1024, 4, 8),
                (16, 256, 1, 4),
                (16, 256, 4, 4),
                (16, 256, 6, 4),
                (16, 512, 1, 4),
                (16, 512, 4, 4),
                (16, 512, 4, 8),
                (32, 256, 4, 8),
                (32, 512, 3, 8),
            )
            if m * e * block <= 128 * warps * 64
        ]
    block = min(64, max(16, triton.next_power_of_2(rows)))
    return [
        {
            "BLOCK_M": m,
            "BLOCK_N": block,
            "BLOCK_E": e,
            "STAGES": stages,
            "NORM_APART": is_apart,
            "num_warps": warps,
        }
        for m, e, stages, warps in (
            (16, 256, 4, 4),
            (32, 256, 4, 4),
            (32, 128, 6, 4),
            (64, 128, 4, 4),
            (64, 64, 6, 4),
            (64, 256, 3, 4),
            (128, 64, 5, 4),
            (128, 64, 6, 8),
            (128, 128, 4, 8),
        )
        for is_apart in (0, 1)
        if (m + block) * e * 2 * stages <= 220 * 1024
    ]
