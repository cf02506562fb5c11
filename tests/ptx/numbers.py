"""Numbers of PTX types in registers of unsigned words."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


def width_of(kind: str) -> int:
    """Bits of one value; of both of a pair."""
    if kind == "pred":
        return 1
    found = re.fullmatch(r"[a-z]+(\d+)(x2)?", kind)
    assert found is not None, kind
    return int(found[1]) * (2 if found[2] else 1)


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def decode(words: Array, kind: str) -> Array:
    """Values of a type from unsigned words of its width; of pairs as ``[2, ...]``; bf16 as fp32."""
    if kind.endswith("x2"):
        halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)]).astype(np.uint16)
        return decode(halves, kind[:-2])
    if kind == "bf16":
        return np.asarray(words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind[0] == "f":
        return words.view(FLOATS[int(kind[1:])])
    return words.view(SIGNED[int(kind[1:])]) if kind[0] == "s" else words


def encode(values: Array, kind: str) -> Array:
    """Words of a type's width; floats are rounded to nearest even, integers wrap around."""
    if kind.endswith("x2"):
        low, high = encode(values, kind[:-2]).astype(np.uint32)
        return np.asarray(low | (high << np.uint32(16)))
    width = width_of(kind)
    if kind == "bf16":
        return _bf16(np.asarray(values, np.float32))
    if kind[0] == "f":
        return np.asarray(values).astype(FLOATS[width]).view(UNSIGNED[width])
    if kind[0] == "s":
        return np.asarray(values).astype(SIGNED[width]).view(UNSIGNED[width])
    return np.asarray(values).astype(UNSIGNED[width])


def wider(values: Array) -> Array:
    """The same integers in twice the width."""
    return np.asarray(values.astype(f"{values.dtype.kind}{2 * values.dtype.itemsize}"))


def high_half(a: Array, b: Array) -> Array:
    """The upper half of the product's bits, for signed and unsigned integers."""
    width = 8 * a.dtype.itemsize
    if width < 64:
        wide = wider(a) * wider(b)
        return np.asarray(wide >> wide.dtype.type(width))
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    low, middle = (x & mask) * (y & mask), (x >> half) * (y & mask)
    other = (x & mask) * (y >> half) + (middle & mask) + (low >> half)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "u":
        return np.asarray(high)
    return np.asarray(
        high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    ).view(np.int64)


def _bf16(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))
