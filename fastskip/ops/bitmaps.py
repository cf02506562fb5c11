"""Matrices of which many entries are zero: a bit for each entry, and the entries that are not.

Of a matrix ``[M, E]`` in a dtype of ``b`` bytes, of which a share ``s`` is zero, that takes
``1 / 8 + (1 - s) b`` bytes an entry: 0.56 of the dense ones in bf16 at half, 0.36 at 70 %. Letters:
``M`` out features, ``E`` in features, ``N`` rows of an input, ``k`` entries that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32
"""Bits to which a row of a bitmap is filled up, so that it can be read in whole words."""
MOST = 2**31 - 1
"""Kept entries of one matrix at the most: their places are int32."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix ``[M, E]`` as a bitmap and values.

    Attributes:
        bitmap: uint8 ``[M, 4 * ceil(E / 32)]``; bit ``e % 8`` of byte ``e // 8``, the lowest first,
            says whether entry ``e`` of a row is kept.
        values: ``[k]``, the kept entries, row after row.
        starts: int32 ``[M + 1]``: where in ``values`` each row begins, and where the last ends.
        columns: ``E``.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor
    columns: int


def pack_bits(mask: Tensor) -> Tensor:
    """Boolean ``[M, E]`` as a bitmap, uint8 ``[M, 4 * ceil(E / 32)]``; bits past ``E`` are 0."""
    filled = F.pad(mask, (0, -mask.shape[1] % WORD))
    bits = filled.view(len(mask), filled.shape[1] // 8, 8).to(torch.uint8)
    return (bits << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """The mask of a bitmap: boolean ``[M, E]``."""
    bits = (bitmap[..., None] >> _shifts(bitmap.device)) & 1
    return bits.flatten(1)[:, :columns].view(torch.bool)


def starts_of(bitmap: Tensor, columns: int) -> Tensor:
    """Where the values of each row begin: int32 ``[M + 1]``."""
    counts = unpack_bits(bitmap, columns).sum(1)
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def bitmap_bytes(rows: int, columns: int) -> int:
    """How many bytes a bitmap of ``[rows, columns]`` takes."""
    return rows * (-(-columns // WORD) * WORD // 8)


def pack(weight: Tensor) -> Packed:
    """A dense matrix ``[M, E]`` without its zeros.

    Raises:
        ValueError: more entries are kept than can be numbered.
    """
    mask = weight != 0
    values = weight[mask]
    if len(values) > MOST:
        raise ValueError(f"weight: {len(values)} entries that are not 0; allowed: {MOST}")
    bitmap = pack_bits(mask)
    return Packed(bitmap, values, starts_of(bitmap, weight.shape[1]), weight.shape[1])


def expand(packed: Packed) -> Tensor:
    """The dense matrix ``[M, E]``, bit by bit what was packed (a zero has no sign)."""
    mask = unpack_bits(packed.bitmap, packed.columns)
    dense = torch.zeros(mask.shape, dtype=packed.values.dtype, device=mask.device)
    return dense.masked_scatter_(mask, packed.values)


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``[N, E] -> [N, M]``; expands the matrix, then multiplies."""
    return F.linear(x, expand(packed), bias)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
