"""The norm kernel against its torch form and fp64."""

import pytest
import torch
from torch import Tensor

from fastskip.kernels.norm import candidates, normalize
from fastskip.ops import fused
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import Norm
from tests.budget import assert_within_budget
from tests.kernels.paging import exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIG = {"num_warps": 4}


def build_norm(size: int, *, is_centred: bool, has_bias: bool) -> Norm:
    bias = exact(size, seed=2) if has_bias else None
    return Norm(exact(size, seed=1), 1e-5, bias, is_centred)


def in_dtype(norm: Norm, dtype: torch.dtype, device: torch.device) -> Norm:
    bias = None if norm.bias is None else norm.bias.to(device, dtype)
    return Norm(norm.weight.to(device, dtype), norm.epsilon, bias, norm.is_centred)


def check(
    h: Tensor, norm: Norm, dtype: torch.dtype, device: torch.device, **options: Tensor
) -> None:
    """``options``: ``index`` and ``change``, the latter in fp64."""
    own = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in options.items()
    }
    # A view into wider rows, whose rest must not be read.
    wide = torch.full((len(h), h.shape[1] + 8), float("nan"), dtype=dtype, device=device)
    rows = wide[:, : h.shape[1]].copy_(h)
    before = wide.clone()
    small = in_dtype(norm, dtype, device)
    actual = normalize(rows, small, **own, config=CONFIG)
    assert actual.is_contiguous()
    assert_within_budget(
        "norm", actual, fused.normalize(rows, small, **own), fused.normalize(h, norm, **options)
    )
    assert torch.equal(wide.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_centred", "has_bias"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("size", [37, 128])
def test_rms_and_layer_norm(
    size: int, is_centred: bool, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    norm = build_norm(size, is_centred=is_centred, has_bias=has_bias)
    # Far from centred, so that RMS norm and LayerNorm differ.
    h = (exact(3, size, seed=3) + 2).bfloat16().double()
    check(h, norm, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_centred", [False, True])
def test_rows_and_change(is_centred: bool, dtype: torch.dtype, device: torch.device) -> None:
    norm = build_norm(72, is_centred=is_centred, has_bias=is_centred)
    h, change = exact(6, 72, seed=4), exact(3, 72, seed=5)
    index = torch.tensor([5, 0, 2], dtype=torch.int32)
    check(h, norm, dtype, device, index=index)
    check(h, norm, dtype, device, index=index, change=change)
    check(h[:3], norm, dtype, device, change=change)
    check(h, norm, dtype, device, index=index[:1])


@pytest.mark.parametrize("count", [0, 2, 3])
def test_count_on_the_device_ends_the_rows(count: int, device: torch.device) -> None:
    norm = in_dtype(build_norm(24, is_centred=True, has_bias=True), torch.float32, device)
    h = exact(6, 24, seed=4).float().to(device)
    change = exact(3, 24, seed=5).float().to(device)
    index = torch.tensor([5, 0, 2], dtype=torch.int32, device=device)
    number = torch.tensor([count], dtype=torch.int32, device=device)
    with poisoned():
        found = normalize(h, norm, index=index, count=number, change=change)
    wanted = fused.normalize(h, norm, index=index, change=change)
    torch.testing.assert_close(found[:count], wanted[:count])
    assert found.shape == (3, 24) and found[count:].isnan().all()


def test_change_is_added_before_rounding(device: torch.device) -> None:
    """The sum stays in fp32: a change below the resolution of bf16 still counts."""
    h = torch.full((1, 16), 256.0, dtype=torch.bfloat16, device=device)
    change = torch.full_like(h, 0.5)
    change[0, ::2] = -0.5
    ones = torch.ones(16, dtype=torch.bfloat16, device=device)
    norm = Norm(ones, 1e-5, is_centred=True)
    assert normalize(h, norm, change=change)[0, :2].tolist() == [-1, 1]


def test_small_rows_are_divided_by_epsilon_too(device: torch.device) -> None:
    norm = Norm(torch.ones(16, device=device), 1e-2)
    h = torch.full((1, 16), 1e-3, device=device)
    torch.testing.assert_close(normalize(h, norm), h * (1e-2 + 1e-6) ** -0.5)
    assert not normalize(torch.zeros_like(h), norm).any()


def test_no_rows(device: torch.device) -> None:
    norm = Norm(torch.ones(16, device=device), 1e-5)
    h = torch.ones(4, 16, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    assert normalize(h, norm, index=none).shape == (0, 16)
    assert normalize(h[:0], norm).shape == (0, 16)


def test_gradients_are_refused(device: torch.device) -> None:
    norm = Norm(torch.ones(16, device=device), 1e-5)
    h = torch.ones(1, 16, device=device)
    with pytest.raises(ValueError, match="change: requires a gradient"):
        normalize(h, norm, change=h.clone().requires_grad_())


@pytest.mark.parametrize("size", [16, 896, 4096, 5120, 12288])
def test_there_are_candidates(size: int) -> None:
    assert candidates(640, (size,))
