"""Where the threads of a warp hold the elements of matrices, and who reads whose in a shuffle.

Layouts: PTX ISA, "Warp-Level Matrix Instructions" and "Asynchronous Warpgroup-Level Matrix Shared
Memory Layout". ``g`` is a lane's group of four, ``t`` its place there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.ptx.numbers import Array

WARP = 32
GROUP, PLACE = np.arange(WARP) // 4, np.arange(WARP) % 4


def sources(mode: str, by: Array, clamp: Array) -> tuple[Array, Array]:
    """``[warps, 32]``: the lanes that a shuffle reads, and whether they are in range."""
    lanes = np.arange(WARP)
    segment = (clamp >> 8) & 31
    last = (lanes & segment) | (clamp & 31 & ~segment)
    if mode == "up":
        source = lanes - by
        is_inside = source >= last
    elif mode == "down":
        source = lanes + by
        is_inside = source <= last
    elif mode == "bfly":
        source = lanes ^ by
        is_inside = source <= last
    else:
        source = (lanes & segment) | (by & ~segment)
        is_inside = source <= last
    return np.where(is_inside, source, lanes), is_inside


def rows_of(parts: Array, columns: int) -> Array:
    """``[..., 32, registers, 2]`` 16-bit elements of a 16-row operand or result with ``columns``
    columns as ``[..., 16, columns]``.

    Registers hold, for every 8 columns of a result and every 16 of an operand, rows ``g`` and ``g +
    8`` in turn, two neighbouring columns each.
    """
    made = np.empty((*parts.shape[:-3], 16, columns), parts.dtype)
    for number, half, row, column in _places(columns):
        made[..., row, column] = parts[..., :, number, half]
    return made


def fragment_of(rows: Array) -> Array:
    """The inverse of ``rows_of``."""
    columns = rows.shape[-1]
    parts = np.empty((*rows.shape[:-2], WARP, columns // 4, 2), rows.dtype)
    for number, half, row, column in _places(columns):
        parts[..., :, number, half] = rows[..., row, column]
    return parts


def _places(columns: int) -> Iterator[tuple[int, int, Array, Array]]:
    """Registers, their halves, and the row and column in which these stand, of each lane."""
    for number in range(columns // 4):
        for half in range(2):
            yield number, half, GROUP + 8 * (number % 2), 8 * (number // 2) + 2 * PLACE + half


def columns_of(parts: Array) -> Array:
    """``[..., 32, 2, 2]``: the other operand, ``[..., 16, 8]``: registers hold rows ``2 t`` and ``2
    t + 8``, and the next, of column ``g``."""
    made = np.empty((*parts.shape[:-3], 16, 8), parts.dtype)
    for number in range(2):
        for half in range(2):
            made[..., 8 * number + 2 * PLACE + half, GROUP] = parts[..., :, number, half]
    return made


def tile_addresses(descriptors: Array, rows: int, is_transposed: bool) -> Array:
    """``[n, rows, 16]``: where the elements of a tile of ``rows`` by 16 lie in shared memory.

    ``is_transposed``: neighbours in memory are of one column, not of one row.
    """
    words = descriptors.astype(np.uint64)[:, None, None]

    def field(low: int, bits: int) -> Array:
        return ((words >> np.uint64(low)) & np.uint64((1 << bits) - 1)).astype(np.int64)

    start, leading, stride = (field(low, 14) << 4 for low in (0, 16, 32))
    modes = set(field(62, 2).ravel().tolist())
    assert len(modes) == 1, "tiles of different layouts"
    (mode,) = modes
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if is_transposed:
        row, column = column, row
    pitch = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    across = pitch // 2
    # Rows of ``pitch`` bytes along what is contiguous.
    place = start + (row // 8) * stride + (row % 8) * pitch
    place = place + (column // across) * leading + (column % across) * 2
    swizzled = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
    return np.asarray(place ^ (((place >> 7) & swizzled) << 4))
