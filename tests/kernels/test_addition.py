"""Rows added in place against torch."""

import pytest
import torch

from fastskip.kernels.addition import add_rows_, candidates
from tests.budget import assert_within_budget
from tests.kernels.paging import exact

CONFIG = {"BLOCK_D": 64, "num_warps": 4}
INDEX = (6, 0, 3)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("width", (64, 100))
@pytest.mark.parametrize("is_indexed", (False, True))
def test_is_an_addition(
    dtype: torch.dtype, width: int, is_indexed: bool, device: torch.device
) -> None:
    h64, x64 = exact(8, width, seed=0).to(device), exact(3, width, seed=1).to(device)
    rows = list(INDEX) if is_indexed else [0, 1, 2]
    index = torch.tensor(INDEX, dtype=torch.int32, device=device) if is_indexed else None
    # Within something wider, whose rest must stay as it is.
    memory = torch.full((8, width + 8), 5.0, dtype=dtype, device=device)
    memory[:, :width] = h64
    h = memory[:, :width]
    before = h.clone()
    assert add_rows_(h, x64.to(dtype), index=index, factor=0.3, config=CONFIG) is h
    eager, truth = before.clone(), h64.clone()
    eager[rows] += 0.3 * x64.to(dtype)
    truth[rows] += 0.3 * x64
    assert_within_budget("add_rows", h, eager, truth)
    untouched = [row for row in range(8) if row not in rows]
    assert torch.equal(h[untouched], before[untouched])
    assert (memory[:, width:] == 5).all()


def test_one_row_for_all(device: torch.device) -> None:
    h, bias = torch.zeros(3, 40, device=device), exact(40, seed=0).float().to(device)
    torch.testing.assert_close(add_rows_(h, bias.expand(3, -1)), bias.expand(3, -1))


def test_no_rows_and_gradients(device: torch.device) -> None:
    h = torch.ones(3, 40, device=device)
    assert torch.equal(add_rows_(h.clone(), h[:0]), h)
    with pytest.raises(ValueError, match="gradient"):
        add_rows_(h, h.clone().requires_grad_())
    assert candidates(640, (4096,))
