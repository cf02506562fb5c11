"""Second halves of sublayers: products added to the residual stream in place."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fastskip.kernels import residual
from fastskip.kernels.launch import recording
from fastskip.ops import allocate, fused
from fastskip.ops.contracts import Linear, Term
from tests.budget import assert_within_budget
from tests.kernels.paging import exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTH = 40


def build_terms(rows: int, sizes: Sequence[int], biases: Sequence[bool]) -> list[Term]:
    return [
        Term(
            exact(rows, size, seed=size),
            Linear(
                exact(WIDTH, size, seed=size + 1, scale=size**-0.5),
                exact(WIDTH, seed=size + 2) if has_bias else None,
            ),
        )
        for size, has_bias in zip(sizes, biases, strict=True)
    ]


def cast(terms: Sequence[Term], device: torch.device, dtype: torch.dtype) -> list[Term]:
    """The terms in a dtype; each input is part of something wider, as a slice of a product is."""
    found = []
    for term in terms:
        rows, size = term.x.shape
        wide = torch.full((rows, size + 8), float("nan"), dtype=dtype, device=device)
        wide[:, :size] = term.x
        weight, bias = term.linear.weight, term.linear.bias
        found.append(
            Term(
                wide[:, :size],
                Linear(weight.to(device, dtype), None if bias is None else bias.to(device, dtype)),
            )
        )
    return found


def dense(terms: Sequence[Term]) -> list[Term]:
    """The same for torch, whose bf16 products on a CPU read what lies between the rows."""
    return [Term(term.x.contiguous(), term.linear) for term in terms]


def check_add(
    dtype: torch.dtype,
    device: torch.device,
    terms: Sequence[Term],
    *,
    index: Sequence[int] | None = None,
    changes: int = 0,
    factor: float = 1.0,
    config: Mapping[str, int] | None = None,
) -> None:
    rows = len(terms[0].x)
    total = rows + 3
    whole = exact(total, WIDTH + 8, seed=5)
    added = [exact(rows, WIDTH, seed=50 + number) for number in range(changes)]
    places = None if index is None else torch.tensor(index, dtype=torch.int32)

    def results(
        function: object, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        memory = whole.clone().to(device, dtype)
        h = memory[:, :WIDTH] if index is not None else memory[:rows, :WIDTH]
        assert callable(function)
        given = cast(terms, torch.device(device), dtype)
        extra = {"config": config}
        if function is fused.add_terms_:
            given, extra = dense(given), {}
        returned = function(
            h,
            given,
            index=None if places is None else places.to(device),
            changes=[change.to(device, dtype) for change in added],
            factor=factor,
            **extra,
        )
        assert returned is h
        return memory, memory[list(index) if index is not None else slice(rows), :WIDTH]

    memory, actual = results(residual.add_terms_, dtype, device)
    _, eager = results(fused.add_terms_, dtype, device)
    _, truth = results(fused.add_terms_, torch.float64, "cpu")
    if rows:
        assert_within_budget("rows", actual=actual, eager=eager, truth=truth)
    touched = torch.zeros(memory.shape, dtype=torch.bool)
    touched[list(index) if index is not None else slice(rows), :WIDTH] = True
    assert torch.equal(memory.cpu()[~touched], whole.to(dtype)[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_one_term(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    check_add(dtype, device, build_terms(rows, [70], [True]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_two_terms_of_different_sizes(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    check_add(dtype, device, build_terms(rows, [64, 90], [False, False]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_everything_at_once(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    order = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(rows))[:rows]
    terms = build_terms(rows, [33, 130], [True, True])
    check_add(dtype, device, terms, index=order.tolist(), changes=2, factor=0.5)


SMALL = (
    {"BLOCK_M": 16, "BLOCK_N": 2, "BLOCK_E": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_E": 32, "STAGES": 2, "num_warps": 4},
)


@pytest.mark.parametrize(
    ("dtype", "config"),
    # fp32 is streamed in any case.
    [(d, c) for d in DTYPES for c in SMALL if d != torch.float32 or c["BLOCK_N"] <= 4],
)
def test_many_blocks(dtype: torch.dtype, config: Mapping[str, int], device: torch.device) -> None:
    """More than one block of weights, of rows and of summands, none of them full."""
    rows = config["BLOCK_N"] + 1
    terms = build_terms(rows, [64, 90], [True, False])
    check_add(dtype, device, terms, changes=2, config=config)
    ours = cast([terms[1], terms[1]], device, dtype)
    for mine in residual.apply_terms(ours, config=config):
        eager, truth = fused.apply_terms(dense(ours))[0], fused.apply_terms(terms)[1]
        assert_within_budget("applied", actual=mine, eager=eager, truth=truth)


@pytest.mark.parametrize("rows", [2, 9])
def test_bias_of_one_term_and_one_change(rows: int, device: torch.device) -> None:
    for biases in ([True, False], [False, True]):
        terms = build_terms(rows, [48, 24], biases)
        check_add(torch.float16, device, terms, changes=1, factor=2.0)


def test_zero_rows_launch_nothing(device: torch.device) -> None:
    terms = build_terms(0, [16, 24], [True, False])
    with recording() as account:
        check_add(torch.float32, device, terms)
        check_add(torch.float32, device, terms, index=[])
        applied = residual.apply_terms(cast(terms, device, torch.float32))
    assert [tuple(each.shape) for each in applied] == [(0, WIDTH), (0, WIDTH)]
    assert account.launches == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize(
    ("sizes", "biases", "launches"),
    [([70], [True], 1), ([50, 50], [False, False], 1), ([50, 50], [True, True], 1),
     ([34, 80], [False, True], 2)],
)  # fmt: skip
def test_apply_terms(
    rows: int,
    sizes: list[int],
    biases: list[bool],
    launches: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    terms = build_terms(rows, sizes, biases)
    if sizes[0] == sizes[-1] and len(terms) == 2:
        # The second of a pair differs in everything but its layout.
        other, bias = terms[1].linear.weight.flip(0), terms[1].linear.bias
        terms[1] = Term(-terms[1].x, Linear(other, None if bias is None else bias.flip(0)))
    ours = cast(terms, device, dtype)
    with allocate.poisoned(), recording() as account:
        actual = residual.apply_terms(ours)
    assert len(account.launches) == launches
    for number, (mine, eager, truth) in enumerate(
        zip(actual, fused.apply_terms(dense(ours)), fused.apply_terms(terms), strict=True)
    ):
        assert_within_budget(f"term {number}", actual=mine, eager=eager, truth=truth)


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_one_launch_and_no_data(rows: int) -> None:
    meta = torch.device("meta")
    terms = cast(build_terms(rows, [64, 128], [True, False]), meta, torch.bfloat16)
    h = torch.empty(rows, WIDTH, dtype=torch.bfloat16, device=meta)
    with recording(is_dry=True) as account:
        residual.add_terms_(h, terms, changes=[h])
        residual.apply_terms(terms[:1])
    assert [launch.name for launch in account.launches].count("add_terms") <= 1
    assert len(account.launches) == 2


def test_gradients_are_refused(device: torch.device) -> None:
    terms = cast(build_terms(1, [16], [False]), device, torch.float32)
    h = torch.zeros(1, WIDTH, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="h: requires a gradient"):
        residual.add_terms_(h, terms)
