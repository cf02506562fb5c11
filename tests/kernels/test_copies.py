"""The copy of entries against its torch form: equal bits, all of the cache's memory."""

import pytest
import torch
from torch import Tensor

from fastskip.kernels.copies import candidates, copy_entries, read_entries
from fastskip.kernels.launch import recording
from fastskip.ops import fused
from fastskip.ops.contracts import Pages
from tests.kernels.paging import build_pages, fill_pages

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPACITY = (70, 200)
ROWS = ((0, 2, 64), (1, 130, 0), (1, 64, 63), (0, 69, 3), (1, 5, -1), (0, -1, -1), (1, 0, 199))
"""Sequence, slot to read and slot to write: across page borders, and nowhere."""


def bits(pages: Pages) -> Tensor:
    whole = torch.cat([slab.flatten() for slab in pages.slabs])
    return whole.view(torch.int32 if whole.element_size() == 4 else torch.int16)


def columns(rows: tuple[tuple[int, ...], ...], device: torch.device) -> list[Tensor]:
    table = torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 3)
    return [column.contiguous() for column in table.T]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "head_dim"), [(2, 16), (3, 80)])
def test_copy_entries(groups: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    def build(layer: int) -> Pages:
        return build_pages(
            CAPACITY, groups=groups, head_dim=head_dim, dtype=dtype, device=device, layer=layer
        )

    source, actual, expected = fill_pages(build(1), (70, 131)), build(0), build(0)
    before = bits(source).clone()
    copy_entries(source, actual, *columns(ROWS, device), config={"BLOCK_H": 4, "num_warps": 4})
    fused.copy_entries(source, expected, *columns(ROWS, device))
    assert not torch.equal(bits(actual), bits(build(0)))
    assert torch.equal(bits(actual), bits(expected))
    assert torch.equal(bits(source), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [(0,) * 7, (1,) * 7, (0, 1, 0, 0, 1, 0, 1)])
def test_rows_with_entries_of_their_own_copy_nothing(
    flags: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    def build(layer: int) -> Pages:
        return build_pages(CAPACITY, groups=2, head_dim=16, dtype=dtype, device=device, layer=layer)

    source, actual, expected = fill_pages(build(1), (70, 131)), build(0), build(0)
    runs = torch.tensor(flags, dtype=torch.int32, device=device)
    sequences, from_slots, to_slots = columns(ROWS, device)
    with recording() as account:
        copy_entries(source, actual, sequences, from_slots, to_slots, runs)
    fused.copy_entries(source, expected, sequences, from_slots, to_slots, runs)
    assert torch.equal(bits(actual), bits(expected))
    assert torch.equal(bits(actual), bits(build(0))) == all(flags)
    assert account.guarded_programs == account.programs > 0


def test_no_rows_and_rows_without_a_slot(device: torch.device) -> None:
    def build() -> Pages:
        return build_pages(CAPACITY, groups=1, head_dim=16, dtype=torch.float32, device=device)

    source, target = fill_pages(build(), (3, 3)), build()
    for slab in target.slabs:
        slab.zero_()
    copy_entries(source, target, *columns((), device))
    copy_entries(source, target, *columns(((0, -1, 1), (1, 1, -1)), device))
    assert not bits(target).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "head_dim"), [(2, 16), (3, 80)])
def test_read_entries(groups: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    pages = build_pages(CAPACITY, groups=groups, head_dim=head_dim, dtype=dtype, device=device)
    fill_pages(pages, (70, 131))
    sequences, slots = columns(((0, 0, 0), (1, 130, 0), (1, 64, 0), (0, 69, 0)), device)[:2]
    found = read_entries(pages, sequences, slots, config={"BLOCK_H": 4, "num_warps": 4})
    expected = fused.read_entries(pages, sequences, slots)
    for actual, right in zip(found, expected, strict=True):
        assert actual.shape == (4, groups, head_dim) and actual.is_contiguous()
        assert torch.equal(actual, right)
    none = read_entries(pages, sequences[:0], slots[:0])
    assert none[0].shape == none[1].shape == (0, groups, head_dim)


@pytest.mark.parametrize("shape", [(32, 128), (2, 64), (1, 16)])
def test_there_are_candidates(shape: tuple[int, int]) -> None:
    assert candidates(640, shape)
