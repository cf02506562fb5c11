"""Products on a CPU: the forms that are quicker compute what the plain call does."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from benchmarks import products as benchmark
from fastskip.ops import products
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import Activation, Linear
from fastskip.timing import threads_set
from tests.budget import assert_within_budget

SMALL = 1 << 10
ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 48, 64, 65, 70, 130)


@pytest.fixture(autouse=True)
def forms_of_small_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same choices, at sizes that take no time."""
    monkeypatch.setattr(products, "LARGE", SMALL)
    monkeypatch.setattr(products, "LARGE_FOR_ONE", SMALL)
    monkeypatch.setattr(products, "SLICE", 48)
    monkeypatch.setattr(products, "FEWEST", 8)
    monkeypatch.setattr(products, "FEW", 64)
    monkeypatch.setattr(products, "MANY", 128)
    monkeypatch.setattr(products, "_has_avx512", lambda: False)
    with torch.no_grad(), poisoned():
        yield


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(48, 40), (49, 40), (200, 40), (20, 100)], ids=str)
def test_the_sum_is_the_same(
    shape: tuple[int, int], rows: int, threads: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape[1], generator=generator)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if has_bias else None
    with threads_set(threads):
        found = products.linear(x, weight, bias)
    assert found.shape == (rows, shape[0])
    assert found.is_contiguous()
    if rows:
        wide = None if bias is None else bias.double()
        truth = F.linear(x.double(), weight.double(), wide)
        assert_within_budget("product", found, F.linear(x, weight, bias), truth)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 16, 33, 64, 65, 130])
def test_the_ffn_is_the_same(rows: int, activation: Activation, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, inner, width = drawn(rows, 40), 60, 49
    wide = 2 * inner if activation is Activation.GATED_SILU else inner
    up = Linear(drawn(wide, 40), drawn(wide) if has_bias else None)
    down = Linear(drawn(width, inner), drawn(width) if has_bias else None)
    found = products.feed_forward(x, up, activation, down)
    assert found.shape == (rows, width)
    assert found.is_contiguous()
    if rows:
        eager, truth = (_ffn(x, up, activation, down, dtype) for dtype in (x.dtype, torch.float64))
        assert_within_budget("FFN", found, eager, truth)


def _ffn(
    x: torch.Tensor, up: Linear, activation: Activation, down: Linear, dtype: torch.dtype
) -> torch.Tensor:
    own = [
        None if each is None else each.to(dtype)
        for each in (x, up.weight, up.bias, down.weight, down.bias)
    ]
    fed = F.linear(own[0], own[1], own[2])  # type: ignore[arg-type]
    if activation is Activation.GATED_SILU:
        gate, other = fed.chunk(2, dim=-1)
        fed = F.silu(gate) * other
    else:
        fed = fed.relu()
    return F.linear(fed, own[3], own[4])  # type: ignore[arg-type]


def test_rows_and_weights_that_are_parts_of_others() -> None:
    whole, weights = torch.randn(9, 120), torch.randn(300, 40)
    x, weight = whole[::2, 40:80], weights[50:250]
    truth = F.linear(x.double(), weight.double())
    assert_within_budget("product", products.linear(x, weight, None), F.linear(x, weight), truth)


@pytest.mark.parametrize(("threads", "rows"), [(1, 3), (1, 64), (2, 8)])
def test_what_is_the_librarys_with_avx512(
    threads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(rows, 40), torch.randn(200, 40)
    asked: list[int] = []
    monkeypatch.setattr(F, "linear", lambda *_: asked.append(rows))
    with threads_set(threads):
        products.linear(x, weight, None)
        assert not asked
        monkeypatch.setattr(products, "_has_avx512", lambda: True)
        products.linear(x, weight, None)
        assert asked == [rows]


@pytest.mark.parametrize("rows", [4, 100])
@pytest.mark.parametrize("wants", ["x", "weight"])
def test_gradients_go_through_the_plain_call(wants: str, rows: int) -> None:
    operands = {"x": torch.randn(rows, 40), "weight": torch.randn(200, 40)}
    operands[wants].requires_grad_()
    with torch.enable_grad():
        products.linear(operands["x"], operands["weight"], None).sum().backward()
    assert operands[wants].grad is not None


@pytest.mark.parametrize("rows", [4, 30, 100])
def test_autocast_is_the_librarys(rows: int) -> None:
    x, up, down = torch.randn(rows, 40), Linear(torch.randn(200, 40)), Linear(torch.randn(49, 100))
    with torch.autocast("cpu", torch.bfloat16):
        found = products.linear(x, up.weight, None)
        fed = products.feed_forward(x, up, Activation.GATED_SILU, down)
    assert found.dtype == fed.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_librarys(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 40, dtype=dtype), torch.randn(200, 40, dtype=dtype)
    assert torch.equal(products.linear(x, weight, None), F.linear(x, weight))


def test_the_benchmark_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", {"small": (200, 40)})
    monkeypatch.setattr(benchmark, "FFN", ("FFN", (60, 40)))
    monkeypatch.setattr(benchmark, "MEMORY", 1 << 16)
    benchmark.main(["--rows", "4", "--threads", "1"])
    out = capsys.readouterr().out
    assert "200 x 40" in out and "60 x 40" in out
