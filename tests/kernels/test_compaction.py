"""The compaction kernel: the same rows as torch finds, ascending, without the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastskip.kernels.compaction import candidates, compact
from fastskip.kernels.launch import recording
from fastskip.ops import fused

CONFIG = {"BLOCK": 32, "num_warps": 4}
MASKS: dict[str, Callable[[int], Tensor]] = {
    "none": lambda size: torch.zeros(size, dtype=torch.bool),
    "all": lambda size: torch.ones(size, dtype=torch.bool),
    "every third": lambda size: torch.arange(size) % 3 == 0,
    "last": lambda size: torch.arange(size) == size - 1,
    "first half": lambda size: torch.arange(size) < size // 2,
    "random": lambda size: torch.rand(size) < 0.4,
}


def check(mask: Tensor) -> None:
    index, count = compact(mask, config=CONFIG)
    expected_index, expected_count = fused.compact(mask)
    assert index.dtype == count.dtype == torch.int32 and index.shape == mask.shape
    assert torch.equal(count, expected_count)
    assert torch.equal(index[: int(count)], expected_index[: int(count)])


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 150])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_kind(name: str, size: int, device: torch.device) -> None:
    check(MASKS[name](size).to(device))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_are_true_unless_zero(dtype: torch.dtype, device: torch.device) -> None:
    check((torch.arange(70, device=device) % 4).to(dtype))


def test_part_of_a_mask(device: torch.device) -> None:
    """Any alignment, and what lies behind the part is not counted."""
    check(torch.ones(100, dtype=torch.bool, device=device)[3:68])


def test_one_launch_whatever_the_size() -> None:
    with recording(is_dry=True) as account:
        index, count = compact(torch.empty(100_000, dtype=torch.bool, device="meta"))
    assert len(account.launches) == 1 and index.shape == (100_000,) and count.shape == (1,)


def test_there_are_candidates() -> None:
    assert candidates(640, ())
