"""Products on a CPU: the forms that are quicker compute what the plain call does."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from benchmarks import products as benchmark
from fastskip.ops import half_products, processor, products
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import Activation, Linear
from fastskip.ops.reference import activate
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
    monkeypatch.setattr(processor, "has_avx512", lambda: False)
    monkeypatch.setattr(processor, "has_mkl_for_others", lambda: True)
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
        monkeypatch.setattr(processor, "has_avx512", lambda: True)
        products.linear(x, weight, None)
        assert asked == [rows]


@pytest.mark.parametrize("rows", [1, 2, 64, 100])
def test_everything_is_the_librarys_where_it_is_fast(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_mkl_for_others", lambda: False)
    x, up, down = torch.randn(rows, 40), torch.randn(200, 40), torch.randn(49, 100)
    asked: list[tuple[int, ...]] = []
    plain = F.linear

    def noting(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
        asked.append(tuple(weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", noting)
    products.linear(x, up, None)
    products.feed_forward(x, Linear(up), Activation.GATED_SILU, Linear(down))
    assert asked == [(200, 40), (200, 40), (49, 100)]


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


def test_fp64_is_the_librarys() -> None:
    x, weight = torch.randn(4, 40).double(), torch.randn(200, 40).double()
    assert torch.equal(products.linear(x, weight, None), F.linear(x, weight))


HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LARGE", "LARGE_FOR_ONE"):
        monkeypatch.setattr(half_products, name, SMALL)
    monkeypatch.setattr(half_products, "FEW", 64)
    monkeypatch.setattr(processor, "has_amx", lambda dtype: dtype in HALVES)


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 9, 64, 65])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_sum_is_the_same_in_half_precision(
    dtype: torch.dtype, rows: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 40), (200, 40), (200,))
    x, weight, drawn = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    bias = drawn if has_bias else None
    found = products.linear(x, weight, bias)
    assert found.shape == (rows, 200)
    assert found.is_contiguous()
    if rows:
        wide = None if bias is None else bias.double()
        truth = F.linear(x.double(), weight.double(), wide)
        assert_within_budget("product", found, F.linear(x, weight, bias), truth)


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("rows", [0, 1, 9, 64, 65])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_ffn_is_the_same_in_half_precision(
    dtype: torch.dtype, rows: int, activation: Activation, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    wide = 120 if activation is Activation.GATED_SILU else 60

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    up = Linear(drawn(wide, 40), drawn(wide) if has_bias else None)
    down = Linear(drawn(40, 60), drawn(40) if has_bias else None)
    x = drawn(rows, 40)
    found = products.feed_forward(x, up, activation, down)
    assert found.shape == (rows, 40)
    assert found.is_contiguous()

    def plain(kind: torch.dtype) -> torch.Tensor:
        biases = [None if each.bias is None else each.bias.to(kind) for each in (up, down)]
        inner = activate(F.linear(x.to(kind), up.weight.to(kind), biases[0]), activation)
        return F.linear(inner, down.weight.to(kind), biases[1])

    if rows:
        assert_within_budget("FFN", found, plain(dtype), plain(torch.float64))


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("rows", [1, 4, 65])
def test_which_form_half_precision_takes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(rows, 40).bfloat16(), torch.randn(200, 40).bfloat16()
    asked: list[int] = []
    monkeypatch.setattr(F, "linear", lambda *_: asked.append(rows))
    products.linear(x, weight, None)
    assert asked == ([rows] if rows > 64 else [])
    asked.clear()
    monkeypatch.setattr(processor, "has_amx", lambda _: False)
    products.linear(x, weight, None)
    assert asked == [rows]


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_in_half_precision_go_through_the_plain_call(rows: int) -> None:
    x = torch.randn(rows, 40).bfloat16().requires_grad_()
    with torch.enable_grad():
        products.linear(x, torch.randn(200, 40).bfloat16(), None).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", benchmark.DTYPES)
def test_the_benchmark_runs(
    dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", {"small": (200, 40)})
    monkeypatch.setattr(benchmark, "FFN", ("FFN", (60, 40)))
    monkeypatch.setattr(benchmark, "MEMORY", 1 << 16)
    benchmark.main(["--rows", "4", "--threads", "1", "--dtype", dtype])
    out = capsys.readouterr().out
    assert "200 x 40" in out and "60 x 40" in out
