"""The product of a prompt's rows against its torch form."""

import pytest
import torch
from torch import Tensor

from fastskip.kernels.launch import recording
from fastskip.kernels.row_gemm import candidates, linear_rows
from fastskip.ops import fused, reference
from fastskip.ops.contracts import Activation, Linear
from tests.budget import assert_within_budget
from tests.kernels.paging import exact

CONFIG = {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_E": 64, "GROUP": 2, "STAGES": 2, "num_warps": 4}
FACTOR = 0.5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = (None, Activation.RELU, Activation.GATED_SILU)


def weights(columns: int, inner: int, activation: Activation | None, *, bias: bool) -> Linear:
    columns *= 2 if activation is Activation.GATED_SILU else 1
    shift = exact(columns, seed=3) if bias else None
    return Linear(exact(columns, inner, seed=2, scale=0.1), shift)


def cast(linear: Linear, like: Tensor) -> Linear:
    return Linear(linear.weight.to(like), None if linear.bias is None else linear.bias.to(like))


def torch_form(
    x: Tensor,
    linear: Linear,
    activation: Activation | None,
    index: Tensor | None,
    out: Tensor,
    out_index: Tensor | None,
    onto: bool,
) -> Tensor:
    y = fused.linear(x if index is None else x[index.long()], linear)
    y = y if activation is None else reference.activate(y, activation)
    out = out.clone()
    place = torch.arange(len(y), device=y.device) if out_index is None else out_index.long()
    out[place] = out[place] + FACTOR * y if onto else y
    return out


def some_rows(total: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "columns", "inner", "is_indexed", "onto", "bias"),
    [
        (37, 45, 72, True, False, True),  # nothing is a multiple of a block
        (37, 45, 72, True, True, False),
        (32, 64, 128, False, True, True),  # everything is
        (1, 33, 40, False, False, True),
    ],
)
def test_is_the_torch_form(
    dtype: torch.dtype,
    activation: Activation | None,
    rows: int,
    columns: int,
    inner: int,
    is_indexed: bool,
    onto: bool,
    bias: bool,
    device: torch.device,
) -> None:
    total = rows + 5 if is_indexed else rows
    index = some_rows(total, rows, 4).to(device) if is_indexed else None
    out_index = some_rows(total, rows, 5).to(device) if is_indexed else None
    x64 = exact(total, inner, seed=0).to(device)
    out64 = exact(total, columns, seed=1).to(device)
    linear64 = cast(weights(columns, inner, activation, bias=bias), x64)

    x, out = x64.to(dtype), out64.to(dtype)
    linear = cast(linear64, x)
    eager = torch_form(x, linear, activation, index, out, out_index, onto)
    truth = torch_form(x64, linear64, activation, index, out64, out_index, onto)
    actual = linear_rows(
        x,
        linear,
        index=index,
        out=out.clone(),
        out_index=out_index,
        activation=activation,
        onto=onto,
        factor=FACTOR if onto else 1.0,
        config=CONFIG,
    )
    assert_within_budget("linear_rows", actual, eager, truth)
    if out_index is not None:
        untouched = torch.ones(total, dtype=torch.bool, device=device)
        untouched[out_index.long()] = False
        assert torch.equal(actual[untouched], out[untouched])


@pytest.mark.parametrize("count", (0, 1, 16, 21, 40))
def test_count_on_the_device_ends_the_rows(count: int, device: torch.device) -> None:
    x = exact(40, 64, seed=0).float().to(device)
    linear = cast(weights(33, 64, None, bias=True), x)
    index = some_rows(40, 40, 4).to(device)
    out = exact(40, 33, seed=1).float().to(device)
    number = torch.tensor([count], dtype=torch.int32, device=device)
    actual = linear_rows(
        x, linear, index=index, out=out.clone(), out_index=index, count=number, onto=True,
        factor=FACTOR, config=CONFIG,
    )  # fmt: skip
    chosen = index[:count]
    wanted = torch_form(x, linear, None, chosen, out, chosen, True)
    torch.testing.assert_close(actual, wanted)
    rest = index[count:].long()
    assert torch.equal(actual[rest], out[rest])


def test_output_is_made_where_none_is_given(device: torch.device) -> None:
    x = exact(20, 32, seed=0).float().to(device)
    linear = cast(weights(24, 32, Activation.GATED_SILU, bias=False), x)
    actual = linear_rows(x, linear, activation=Activation.GATED_SILU)
    assert actual.shape == (20, 24)
    wanted = reference.activate(fused.linear(x, linear), Activation.GATED_SILU)
    torch.testing.assert_close(actual, wanted)


def test_views_are_read_and_written_in_place(device: torch.device) -> None:
    x = exact(20, 64, seed=0).float().to(device)
    linear = cast(weights(32, 32, None, bias=False), x)
    whole = torch.zeros(20, 48, device=device)
    linear_rows(x[3:, 16:48], linear, out=whole[3:, :32], config=CONFIG)
    torch.testing.assert_close(whole[3:, :32], fused.linear(x[3:, 16:48], linear))
    assert not whole[:3].any() and not whole[:, 32:].any()


def test_no_rows_are_no_launch(device: torch.device) -> None:
    x = torch.zeros(0, 32, device=device)
    with recording() as account:
        assert linear_rows(x, Linear(torch.zeros(8, 32, device=device))).shape == (0, 8)
    assert not account.launches


def test_gradients_and_a_missing_output_are_refused(device: torch.device) -> None:
    x, linear = torch.zeros(4, 32, device=device), Linear(torch.zeros(8, 32, device=device))
    with pytest.raises(ValueError, match="gradient"):
        linear_rows(x.clone().requires_grad_(), linear)
    with pytest.raises(ValueError, match="out"):
        linear_rows(x, linear, onto=True)


def test_candidates_are_a_short_list() -> None:
    for rows in (1, 64, 640, 10240):
        assert 4 <= len(candidates(rows, (4096, 4096))) <= 24
