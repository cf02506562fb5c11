"""The activation kernel against its torch form and fp64."""

import pytest
import torch

from fastskip.kernels.activation import activate, candidates
from fastskip.ops import reference
from fastskip.ops.contracts import Activation
from tests.budget import assert_within_budget
from tests.kernels.paging import exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(("rows", "width", "block"), [(1, 32, 32), (3, 70, 32), (2, 33, 128)])
def test_activations(
    rows: int,
    width: int,
    block: int,
    activation: Activation,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    columns = 2 * width if activation is Activation.GATED_SILU else width
    truth = exact(rows, columns, seed=rows, scale=3.0)
    # Part of the wider output of a merged product.
    wide = torch.full((rows, columns + 16), float("nan"), dtype=dtype, device=device)
    x = wide[:, 8:-8].copy_(truth)
    before = x.clone()
    actual = activate(x, activation, config={"BLOCK_F": block, "num_warps": 4})
    assert actual.is_contiguous()
    eager, expected = (reference.activate(own, activation) for own in (x, truth))
    assert_within_budget("activation", actual, eager, expected)
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", Activation)
def test_extremes(activation: Activation, device: torch.device) -> None:
    """Large arguments saturate, and a NaN is not hidden."""
    x = torch.tensor([[-1e30, -200.0, 0.0, 200.0, float("nan")]], device=device)
    columns = torch.cat((x, torch.ones_like(x)), 1) if activation is Activation.GATED_SILU else x
    out = activate(columns, activation)
    assert out[0, :4].tolist() == [0, 0, 0, 200]
    assert out[0, 4].isnan()


def test_no_rows(device: torch.device) -> None:
    none = torch.ones(0, 64, device=device)
    assert activate(none, Activation.GATED_SILU).shape == (0, 32)
    assert activate(none, Activation.RELU).shape == (0, 64)


def test_gradients_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="x: requires a gradient"):
        activate(torch.ones(1, 32, device=device, requires_grad=True), Activation.RELU)


def test_there_are_candidates() -> None:
    assert candidates(1, (11008,))
