"""The reference operations against fp64, in every form that they take."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops import attention, processor, reference
from tests.budget import assert_within_budget

HEADS, WIDTH = 4, 24
SEGMENTS = {5: [5], 12: [9, 3], 130: [130], 300: [200, 90, 10]}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    alike = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(alike, 1), values.repeat_interleave(alike, 1)
    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("slots", SEGMENTS)
@pytest.mark.parametrize("rows", [1, 2, 5, 128, 129, 300])
@pytest.mark.parametrize("sight", ["all", "causal", "masked"])
@pytest.mark.parametrize("attend", [attention.attend_fused, attention.attend_in_blocks])
def test_attention_is_as_close_as_plain_torch(
    attend: Callable[..., Tensor], sight: str, rows: int, slots: int, groups: int
) -> None:
    if rows > slots and sight == "causal":
        rows = slots
    queries = drawn(2, HEADS, rows, WIDTH, seed=1)
    keys, values = (drawn(2, groups, slots, WIDTH, seed=seed) for seed in (2, 3))
    visible = torch.ones(rows, slots, dtype=torch.bool)
    if sight == "causal":
        visible = visible.tril(slots - rows)
    elif sight == "masked":
        visible = drawn(rows, slots, seed=4) > 0
        visible[:, 0] = True  # who sees nothing has no softmax
    found = attend(
        queries,
        keys.split(SEGMENTS[slots], 2),
        values.split(SEGMENTS[slots], 2),
        visible if sight == "masked" else None,
        is_causal=sight == "causal" and rows > 1,
        scale=0.3,
    )
    eager = plain_attention(queries, keys, values, visible, 0.3)
    truth = plain_attention(queries.double(), keys.double(), values.double(), visible, 0.3)
    assert_within_budget("attention", found, eager, truth)


def test_a_mask_kept_for_later_serves_every_length() -> None:
    """Causal masks are views of one that is kept: lengths in any order, with and without modes."""
    values = drawn(1, 1, 700, WIDTH, seed=1)
    for rows, slots in ((3, 3), (128, 128), (7, 600), (128, 129), (100, 257), (2, 700), (64, 64)):
        queries, own = drawn(1, 1, rows, WIDTH), values[:, :, :slots]
        visible = torch.ones(rows, slots, dtype=torch.bool).tril(slots - rows)
        eager = plain_attention(queries, own, own, visible, 1.0)
        truth = plain_attention(queries.double(), own.double(), own.double(), visible, 1.0)
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                found = attention.attend_in_blocks(
                    queries, [own], [own], None, is_causal=True, scale=1.0
                )
            assert_within_budget("attention", found, eager, truth)


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 200])
def test_attention_takes_the_form_that_is_faster_here(
    rows: int, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX many queries take the fused kernel, and in half precision few on one segment too;
    gradients and dropout need it."""
    monkeypatch.setattr(processor, "has_amx", lambda dtype: has_amx and dtype is not torch.float64)
    taken: list[str] = []
    for form in ("attend_fused", "attend_in_blocks"):
        monkeypatch.setattr(attention, form, lambda *_, form=form, **__: taken.append(form))
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    for queries in [torch.ones(1, 1, rows, 4, dtype=dtype) for dtype in kinds]:
        attention.attend(queries, [queries], [queries], None, is_causal=True, scale=1.0)
    fast = "attend_fused" if has_amx and rows == 200 else "attend_in_blocks"
    half = "attend_fused" if has_amx else "attend_in_blocks"
    assert taken == [fast, half, "attend_in_blocks"]
    taken.clear()
    halves = [torch.ones(1, 1, rows, 4, dtype=torch.bfloat16)] * 2
    attention.attend(halves[0], halves, halves, None, is_causal=True, scale=1.0)
    assert taken == [fast]
    taken.clear()
    queries.requires_grad_()
    attention.attend(queries, [queries], [queries], None, is_causal=True, scale=1.0)
    queries = queries.detach()
    attention.attend(queries, [queries], [queries], None, is_causal=True, scale=1.0, dropout=0.1)
    assert taken == ["attend_fused"] * 2


@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (7, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_is_as_close_as_torch_and_writes_nothing(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight = drawn(*shape).to(dtype), drawn(shape[1], seed=1).to(dtype)
    before = x.clone(), weight.clone()
    found = reference.rms_norm(x, weight, 1e-5)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    assert found.dtype == dtype and found.shape == shape
    if len(x):
        truth = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)
        assert_within_budget("norm", found, F.rms_norm(x, weight.shape, weight, 1e-5), truth)


def test_gradients_of_rms_norm_are_torchs() -> None:
    x, weight = drawn(5, 24).double(), drawn(24, seed=1).double()
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-5), (x, weight))
