"""Bitmaps: what is packed comes back, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastskip.ops import bitmaps
from tests.sparse.matrices import with_zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(st.integers(0, 5), st.integers(0, 70), st.integers(0, 2**20), st.sampled_from(DTYPES))
def test_what_is_packed_comes_back(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    weight = with_zeros(rows, columns, seed % 11 / 10, seed=seed).to(dtype)
    packed = bitmaps.pack(weight)
    assert torch.equal(bitmaps.expand(packed), weight)
    assert packed.bitmap.shape == (rows, 4 * -(-columns // 32))
    assert packed.bitmap.numel() == bitmaps.bitmap_bytes(rows, columns)
    counts = (weight != 0).sum(1)
    assert torch.equal(packed.starts.diff(), counts.int())
    for row in range(rows):
        own = packed.values[packed.starts[row] : packed.starts[row + 1]]
        assert torch.equal(own, weight[row][weight[row] != 0])


def test_bits_are_counted_from_the_lowest() -> None:
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, [0, 3, 9]] = True
    assert bitmaps.pack_bits(mask).tolist() == [[0b1001, 0b10, 0, 0]]


def test_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmaps, "MOST", 3)
    with pytest.raises(ValueError, match="weight: 4 non-zero entries; allowed: at most 3"):
        bitmaps.pack(torch.ones(2, 2))
