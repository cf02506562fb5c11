"""Pages of the device cache: what a pool allocates, and that nothing in it ever moves."""

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastskip.decoder.fused.pages import GROWTH_PAGES, PagePool
from fastskip.ops.contracts import PAGE
from fastskip.ops.fused_entries import entries_of, slab_of, write_entries

LAYERS = (1, 4)
GROUPS, WIDTH = 2, 8


def new_pool(batch: int) -> PagePool:
    return PagePool(torch.zeros(16), batch, LAYERS, GROUPS, WIDTH)


def filled(lengths: Sequence[int]) -> PagePool:
    """Every entry of every layer a number of its own."""
    pool = new_pool(len(lengths))
    pool.reserve(lengths, 0)
    for layer in LAYERS:
        for sequence, length in enumerate(lengths):
            write(pool, layer, sequence, range(length))
    return pool


def write(pool: PagePool, layer: int, sequence: int, slots: range, offset: int = 0) -> None:
    where = torch.full((len(slots),), sequence), torch.tensor(list(slots), dtype=torch.int64)
    keys = expected(layer, sequence, slots) + offset
    write_entries(pool.pages_of(layer), *where, keys, -keys)


def expected(layer: int, sequence: int, slots: range) -> Tensor:
    """Keys ``[slots, G, K]``; values are their negatives."""
    numbers = torch.tensor(list(slots)) + 1000 * sequence + 100_000 * layer
    inner = torch.arange(GROUPS * WIDTH).view(GROUPS, WIDTH) / 100
    return numbers[:, None, None].float() + inner


def check(pool: PagePool, sequences: Sequence[int], lengths: Sequence[int]) -> None:
    """Sequence ``i`` of the pool holds what was written for ``sequences[i]``."""
    for layer in LAYERS:
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            keys, values = entries_of(pool.pages_of(layer), row, length)
            want = expected(layer, sequence, range(length)).transpose(0, 1)
            assert torch.equal(keys, want) and torch.equal(values, -want)


def spots(pool: PagePool) -> list[int]:
    """Where all pages begin, in elements from the anchor."""
    return [offset for row in pool.offsets() for offset in row]


def capacities(pool: PagePool) -> list[int]:
    """Slots that each sequence has pages for."""
    return [len(row) * PAGE for row in pool.offsets()]


def test_growth_adds_slabs_and_moves_nothing() -> None:
    pool = filled([1, 64, 65])
    assert capacities(pool) == [64, 64, 128]
    rows, addresses = pool.offsets(), [slab.data_ptr() for slab in pool.slabs]
    assert len(addresses) == 1
    table = pool.table
    assert not pool.reserve([64, 1, 128], 0)
    assert pool.table is table and len(pool.slabs) == 1
    assert pool.reserve([200, 10, 65], 0)
    assert [slab.data_ptr() for slab in pool.slabs[:1]] == addresses and len(pool.slabs) == 2
    assert all(new[: len(old)] == old for new, old in zip(pool.offsets(), rows, strict=True))
    assert pool.offsets()[1:] == rows[1:]  # who has enough gets no more
    check(pool, range(3), [1, 64, 65])
    assert capacities(pool)[0] == (4 + GROWTH_PAGES - 1) * PAGE


def test_table() -> None:
    pool = filled([130, 0, 1])
    table = pool.table
    assert table.shape == (3, 3) and table.dtype == torch.int64
    assert table[0].tolist() == pool.offsets()[0]
    assert table[2].tolist() == pool.offsets()[2] * 3  # a repeat that nobody reads
    for layer in LAYERS:
        pages = pool.pages_of(layer)
        slab, start = slab_of(pages, int(table[0, 1]))
        assert slab is pool.slabs[0] and start % pool.page_elements == 0
    assert [pool.offset_of(layer) for layer in LAYERS] == [0, pool.page_elements // 2]


def test_an_empty_batch_has_a_table() -> None:
    assert new_pool(0).table.shape == (0, 1)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 300), min_size=2, max_size=2), st.integers(0, 200)))
)
def test_what_is_allocated(wanted: list[tuple[list[int], int]]) -> None:
    """Every slot asked for has a page of its own, and few that were not."""
    pool = new_pool(2)
    for needed, later in wanted:
        before = capacities(pool)
        has_grown = pool.reserve(needed, later)
        assert has_grown == any(map(int.__gt__, needed, before))
        for slots, had, got in zip(needed, before, capacities(pool), strict=True):
            assert got >= slots
            if slots <= had:
                assert got == had
            elif later or not had:
                assert got < slots + later + PAGE
            else:
                assert got < slots + GROWTH_PAGES * PAGE
        assert pool.allocated_bytes == sum(map(len, pool.offsets())) * pool.page_elements * 4
    assert len(set(spots(pool))) == len(spots(pool))
    inside = [
        slab_of(pool.pages_of(LAYERS[-1]), spot + pool.page_elements - 1) for spot in spots(pool)
    ]
    assert len(inside) == len(spots(pool))


def test_the_first_pages_hold_what_comes_later() -> None:
    pool = new_pool(2)
    pool.reserve([10, 0], 100)
    assert capacities(pool) == [128, 0]


def test_a_copy_stands_alone() -> None:
    pool = filled([70, 3])
    pool.reserve([70, 100], 0)
    copied = copy.deepcopy(pool)
    assert copied.anchor is pool.anchor
    assert not set(spots(pool)) & set(spots(copied))
    check(copied, range(2), [70, 3])
    write(copied, 4, 0, range(70), offset=7)
    copied.reserve([300, 3], 0)
    check(pool, range(2), [70, 3])
    write(pool, 1, 1, range(3), offset=9)
    pool.reserve([70, 500], 0)
    keys, _ = entries_of(copied.pages_of(1), 1, 3)
    assert torch.equal(keys, expected(1, 1, range(3)).transpose(0, 1))


@pytest.mark.parametrize("sequences", [[2, 0, 0], [1], [0, 1, 2], [1, 1, 2, 2, 0, 0]])
def test_select(sequences: list[int]) -> None:
    lengths = [70, 0, 5]
    pool = filled(lengths)
    pool.reserve([200, 0, 5], 0)  # a second slab
    write(pool, 1, 0, range(70, 140))
    write(pool, 4, 0, range(70, 140))
    lengths[0] = 140
    pool.select(sequences)
    chosen = [lengths[sequence] for sequence in sequences]
    check(pool, sequences, chosen)
    assert len(set(spots(pool))) == len(spots(pool))
    # What one of them writes, no other sees.
    pool.reserve([length + 1 for length in chosen], 0)
    for row, length in enumerate(chosen):
        write(pool, 1, row, range(length, length + 1), offset=row)
    check(pool, sequences, chosen)


def out_of_memory(*args: object) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = filled([70, 3])
    rows, table = pool.offsets(), pool.table
    with monkeypatch.context() as patch:
        patch.setattr("fastskip.decoder.fused.pages.empty", out_of_memory)
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"2 sequences of up to 5000 entries in 2 "
            r"layers\); lower the batch size, max_new_tokens.*kv: omit",
        ):
            pool.reserve([5000, 3], 0)
        with pytest.raises(torch.OutOfMemoryError, match="key/value cache: no memory for 0.00 GiB"):
            pool.select([0, 0])
    assert pool.offsets() == rows and pool.table is table
    check(pool, range(2), [70, 3])
    assert pool.reserve([5000, 3], 0)
    check(pool, range(2), [70, 3])
