"""The product with a bitmap against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastskip.kernels.sparse import sparse_linear
from fastskip.ops import bitmaps
from fastskip.ops.bitmaps import Packed
from tests.budget import assert_within_budget
from tests.sparse.matrices import with_zeros

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def config(rows: int, block_e: int = 32) -> dict[str, int]:
    block = 1 if rows == 1 else 2 if rows == 2 else 4
    return {"BLOCK_M": 8, "BLOCK_N": block, "BLOCK_E": block_e, "num_warps": 4}


def packed_on(weight: torch.Tensor, device: torch.device) -> Packed:
    """With values beyond the last that must not be read."""
    packed = bitmaps.pack(weight)
    values = torch.cat((packed.values, packed.values.new_full((8,), torch.nan)))
    kept = values.to(device)[: len(packed.values)]
    return Packed(packed.bitmap.to(device), kept, packed.starts.to(device), packed.columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 2, 3, 8))
@pytest.mark.parametrize("shape", ((8, 64), (13, 100)))
@pytest.mark.parametrize("has_bias", (False, True))
def test_is_the_dense_product(
    dtype: torch.dtype, rows: int, shape: tuple[int, int], has_bias: bool, device: torch.device
) -> None:
    weight64 = with_zeros(*shape, 0.6)
    x64 = with_zeros(rows, shape[1], 0.0, seed=1).to(dtype).double()
    bias64 = with_zeros(1, shape[0], 0.0, seed=2)[0] if has_bias else None
    weight, x = weight64.to(dtype), x64.to(dtype).to(device)
    bias = None if bias64 is None else bias64.to(dtype).to(device)
    # Rows within something wider.
    wide = torch.full((rows, shape[1] + 3), torch.nan, dtype=dtype, device=device)
    wide[:, : shape[1]] = x
    y = sparse_linear(wide[:, : shape[1]], packed_on(weight, device), bias, config=config(rows))
    eager = F.linear(x, weight.to(device), bias)
    assert_within_budget("sparse_linear", y, eager, F.linear(x64, weight64, bias64))


@pytest.mark.parametrize("share", (0.0, 0.5, 0.9, 1.0))
def test_any_share_of_zeros(share: float, device: torch.device) -> None:
    weight = with_zeros(11, 70, share)
    weight[4] = 0  # a row that keeps nothing lies between others
    x = with_zeros(3, 70, 0.0, seed=1)
    y = sparse_linear(x.float().to(device), packed_on(weight.float(), device), config=config(3, 16))
    eager = F.linear(x.float(), weight.float()).to(device)
    assert_within_budget("sparse_linear", y, eager, F.linear(x, weight))
    assert (y[:, 4] == 0).all()


def test_the_usual_configuration_no_rows_and_gradients(device: torch.device) -> None:
    weight = with_zeros(6, 40, 0.5).float()
    packed = packed_on(weight, device)
    x = with_zeros(5, 40, 0.0).float().to(device)
    truth = F.linear(x.double().cpu(), weight.double())
    eager = F.linear(x, weight.to(device))
    for rows in (1, 2, 5):
        y = sparse_linear(x[:rows], packed)
        assert_within_budget(f"{rows} rows", y, eager[:rows], truth[:rows])
    assert sparse_linear(x[:0], packed).shape == (0, 6)
    with pytest.raises(ValueError, match="gradient"):
        sparse_linear(x.clone().requires_grad_(), packed)
