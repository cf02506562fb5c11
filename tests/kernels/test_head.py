"""The vocabulary product, and the greedy choice that begins within it."""

from typing import Any

import pytest
import torch

from fastskip.kernels import head as kernel
from fastskip.kernels import sampler
from fastskip.kernels.launch import recording
from fastskip.ops import allocate, fused
from fastskip.ops.contracts import Linear, Norm
from tests.budget import assert_within_budget
from tests.kernels.paging import exact
from tests.kernels.test_sampler import assert_same, build_choice

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = ("none", "rms", "layer", "layer and bias")


def build(
    rows: int, norm: str, has_bias: bool, *, width: int = 40, columns: int = 100
) -> tuple[torch.Tensor, Norm | None, Linear]:
    h = exact(rows, width, seed=rows) + 0.5
    weight = exact(columns, width, seed=2, scale=width**-0.5)
    linear = Linear(weight, exact(columns, seed=3) if has_bias else None)
    if norm == "none":
        return h, None, linear
    bias = exact(width, seed=5) if "bias" in norm else None
    return h, Norm(exact(width, seed=4), 1e-5, bias, norm.startswith("layer")), linear


def cast(
    h: torch.Tensor, norm: Norm | None, linear: Linear, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, Norm | None, Linear]:
    def to(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, dtype)

    def surely(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype)

    return (
        surely(h),
        norm and Norm(surely(norm.weight), norm.epsilon, to(norm.bias), norm.is_centred),
        Linear(surely(linear.weight), to(linear.bias)),
    )


def config_of(block: int, **more: int) -> dict[str, int]:
    """Several blocks of rows, of columns and of summands, none of them full."""
    return {"BLOCK_M": 64, "BLOCK_N": block, "BLOCK_E": 32, "STAGES": 2, **more, "num_warps": 4}


FUSED, APART = config_of(16, NORM_APART=0), config_of(16, NORM_APART=1)


def in_each_dtype(*cases: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The cases, which end in a configuration; fp32 is streamed in any case."""
    return [
        (*case, dtype)
        for dtype in DTYPES
        for case in cases
        if dtype != torch.float32 or case[-1] not in (FUSED, APART)
    ]


@pytest.mark.parametrize(
    ("rows", "norm", "has_bias", "config", "dtype"),
    in_each_dtype(
        (1, "none", False, None),
        (1, "rms", True, config_of(1)),
        (1, "layer and bias", True, config_of(1)),
        (3, "rms", True, config_of(2)),
        (3, "layer", False, config_of(4)),
        (18, "none", True, FUSED),
        (18, "rms", False, FUSED),
        (18, "layer and bias", False, FUSED),
        (18, "rms", True, APART),
        (9, "layer", False, None),
    ),
)
def test_head_logits(
    rows: int,
    norm: str,
    has_bias: bool,
    config: dict[str, int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    parts = build(rows, norm, has_bias)
    ours = cast(*parts, device, dtype)
    before = ours[0].clone()
    with allocate.poisoned():
        actual = kernel.head_logits(*ours, config=config)
    assert torch.equal(ours[0], before)
    eager, truth = fused.head_logits(*ours), fused.head_logits(*parts)
    assert_within_budget("logits", actual=actual, eager=eager, truth=truth)


@pytest.mark.parametrize(
    ("rows", "norm", "config", "dtype"),
    in_each_dtype(
        (1, "rms", config_of(1)),
        (2, "none", config_of(2)),
        (4, "layer and bias", config_of(4)),
        (18, "rms", APART),
        (18, "rms", FUSED),
    ),
)
def test_head_choose_is_logits_then_choose(
    rows: int, norm: str, config: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    h, found, linear = cast(*build(rows, norm, True, columns=75), device, dtype)
    logits = torch.full((rows, 80), 9.0, dtype=dtype, device=device)[:, :75]
    expected_logits = kernel.head_logits(h, found, linear, config=config)
    stop = int(expected_logits[0].float().argmax())
    actual, expected, silent = (build_choice(rows, device, stops=(stop,)) for _ in range(3))
    with allocate.poisoned():
        kernel.head_choose(h, found, linear, actual, logits=logits, config=config)
        kernel.head_choose(h, found, linear, silent, config=config)
    sampler.choose(expected_logits, expected)
    assert torch.equal(logits, expected_logits)
    assert_same(actual, expected)
    assert_same(silent, expected)
    whole = logits._base
    assert whole is not None and (whole[:, 75:] == 9).all()


@pytest.mark.parametrize("rows", [1, 17])
def test_ties_after_rounding_go_to_the_first(rows: int, device: torch.device) -> None:
    """1 and 1 + 2**-10 are one number in bf16, so the first of the two is the choice."""
    h = torch.zeros(rows, 32, dtype=torch.bfloat16, device=device)
    h[:, 0], h[:, 1] = 1.0, 2.0**-10
    weight = torch.zeros(150, 32, dtype=torch.bfloat16, device=device)
    weight[[20, 90, 149], 0] = 1.0
    weight[90, 1] = 1.0
    choice = build_choice(rows, device)
    choice.unfinished.fill_(1)
    config = config_of(1 if rows == 1 else 16)
    kernel.head_choose(h, None, Linear(weight), choice, config=config)
    assert choice.tokens.tolist() == [20] * rows


def test_negative_logits_do_not_lose_to_padding(device: torch.device) -> None:
    """All logits are negative, and neither rows nor columns fill their blocks."""
    for rows, block in ((3, 4), (17, 16)):
        h = torch.ones(rows, 40, dtype=torch.float16, device=device)
        weight = -torch.ones(70, 40, dtype=torch.float16, device=device)
        weight[69] *= 0.5
        choice = build_choice(rows, device)
        choice.unfinished.fill_(1)
        kernel.head_choose(h, None, Linear(weight), choice, config=config_of(block))
        assert choice.tokens.tolist() == [69] * rows


def test_zero_rows(device: torch.device) -> None:
    h, norm, linear = cast(*build(0, "rms", False), device, torch.float16)
    assert kernel.head_logits(h, norm, linear).shape == (0, 100)
    choice = build_choice(0, device)
    kernel.head_choose(h, norm, linear, choice)
    assert choice.step.tolist() == [1]


@pytest.mark.parametrize("rows", [1, 4])
def test_head_choose_launches_twice(rows: int) -> None:
    meta = torch.device("meta")
    h, norm, linear = cast(*build(rows, "rms", False), meta, torch.bfloat16)
    with recording(is_dry=True) as account:
        kernel.head_choose(h, norm, linear, build_choice(rows, meta))
    assert [launch.name for launch in account.launches] == ["head", "finish"]


def test_gradients_are_refused(device: torch.device) -> None:
    h, norm, linear = cast(*build(1, "rms", False), device, torch.float32)
    with pytest.raises(ValueError, match="h: requires a gradient"):
        kernel.head_logits(h.requires_grad_(), norm, linear)
