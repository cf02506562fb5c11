"""Products whose tiles several programs share: the same sums, whoever arrives last."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import tune
from benchmarks.gpu.tables import Question
from fastskip.kernels import residual, row_gemm, splits, tuning
from fastskip.kernels.launch import Launch, recording
from fastskip.kernels.tuning import Entry, Table
from fastskip.ops import allocate, compiled, fused, reference
from fastskip.ops.contracts import ARRIVALS, Activation, Linear, Term
from tests.budget import assert_within_budget
from tests.kernels.paging import exact

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TERMS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_E": 32, "STAGES": 2, "num_warps": 4}
ROWS = {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_E": 32, "GROUP": 2, "STAGES": 2, "num_warps": 4}
WIDTH = 40  # of no block a multiple


def zeros(device: torch.device) -> Tensor:
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


def terms_of(rows: int, sizes: list[int], device: torch.device, dtype: torch.dtype) -> list[Term]:
    return [
        Term(
            exact(rows, size, seed=size).to(device, dtype),
            Linear(
                exact(WIDTH, size, seed=size + 1, scale=size**-0.5).to(device, dtype),
                exact(WIDTH, seed=size + 2).to(device, dtype),
            ),
        )
        for size in sizes
    ]


def assert_parts_lie_apart(launch: Launch) -> None:
    """All scratch is written: no two programs leave a part in one place, in whatever order."""
    assert launch.arguments["shared"].parts.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", ([96], [128, 96]))
@pytest.mark.parametrize("is_indexed", (False, True))
def test_terms(
    sizes: list[int], is_indexed: bool, dtype: torch.dtype, device: torch.device
) -> None:
    rows, arrivals = 19, zeros(device)
    index = torch.randperm(rows + 4)[:rows].to(torch.int32) if is_indexed else None
    h = exact(rows + 4 if is_indexed else rows, WIDTH, seed=5)
    changes = [exact(rows, WIDTH, seed=6)]

    def added(
        function: Callable[..., Tensor], place: torch.device, kind: torch.dtype, **more: Any
    ) -> Tensor:
        found = h.clone().to(place, kind)
        function(
            found,
            terms_of(rows, sizes, place, kind),
            index=None if index is None else index.to(place),
            changes=[each.to(place, kind) for each in changes],
            factor=0.5,
            **more,
        )
        return found

    config = {**TERMS, "SPLITS": 2}
    with allocate.poisoned(), recording() as account:
        actual = added(residual.add_terms_, device, dtype, arrivals=arrivals, config=config)
    assert account.launches[0].grid[2] == 2
    assert_parts_lie_apart(account.launches[0])
    eager = added(fused.add_terms_, device, dtype)
    truth = added(fused.add_terms_, CPU, torch.float64)
    assert_within_budget("terms", actual=actual, eager=eager, truth=truth)
    if index is not None:
        others = torch.ones(len(h), dtype=torch.bool)
        others[index.long()] = False
        assert torch.equal(actual.cpu()[others], h.to(dtype)[others])
    assert not arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", (None, Activation.RELU, Activation.GATED_SILU))
@pytest.mark.parametrize(("rows", "inner", "parts"), [(37, 192, 4), (16, 96, 2), (1, 96, 3)])
def test_rows(
    rows: int,
    inner: int,
    parts: int,
    activation: Activation | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    arrivals, gates = zeros(device), 2 if activation is Activation.GATED_SILU else 1
    x = exact(rows, inner, seed=1)
    weight, bias = exact(gates * WIDTH, inner, seed=2, scale=0.1), exact(gates * WIDTH, seed=3)
    h = exact(rows, WIDTH, seed=4)

    def cast(place: torch.device, kind: torch.dtype) -> tuple[Tensor, Tensor, Linear]:
        linear = Linear(weight.to(place, kind), bias.to(place, kind))
        return h.clone().to(place, kind), x.to(place, kind), linear

    def eager_form(place: torch.device, kind: torch.dtype) -> Tensor:
        out, own, linear = cast(place, kind)
        y = fused.linear(own, linear)
        return out + 0.5 * (y if activation is None else reference.activate(y, activation))

    out, own, linear = cast(device, dtype)
    with allocate.poisoned(), recording() as account:
        row_gemm.linear_rows(
            own,
            linear,
            out=out,
            activation=activation,
            onto=True,
            factor=0.5,
            arrivals=arrivals,
            config={**ROWS, "SPLITS": parts},
        )
    assert account.launches[0].grid[1] == parts
    assert_parts_lie_apart(account.launches[0])
    truth = eager_form(CPU, torch.float64)
    assert_within_budget("rows", actual=out, eager=eager_form(device, dtype), truth=truth)
    assert not arrivals.any()


@pytest.mark.parametrize("count", (0, 5, 21))
def test_rows_counted_on_the_device(count: int, device: torch.device) -> None:
    """Blocks of rows beyond the count leave, all programs of them."""
    x, arrivals = exact(40, 96, seed=0).float().to(device), zeros(device)
    linear = Linear(exact(33, 96, seed=1).float().to(device))
    number = torch.tensor([count], dtype=torch.int32, device=device)
    out = torch.full((40, 33), float("nan"), device=device)
    row_gemm.linear_rows(
        x, linear, out=out, count=number, arrivals=arrivals, config={**ROWS, "SPLITS": 2}
    )
    torch.testing.assert_close(out[:count], fused.linear(x[:count], linear))
    assert out[count:].isnan().all()
    assert not arrivals.any()


def test_it_does_not_matter_who_is_last(device: torch.device) -> None:
    """Parts are added in their order, not in that of arrivals: the same bits again and again."""
    x = exact(16, 192, seed=1).to(device, torch.bfloat16)
    linear = Linear(exact(64, 192, seed=2).to(device, torch.bfloat16))
    arrivals, config = zeros(device), {**ROWS, "SPLITS": 4}
    first = row_gemm.linear_rows(x, linear, arrivals=arrivals, config=config)
    for _ in range(20 if device.type == "cuda" else 2):
        again = row_gemm.linear_rows(x, linear, arrivals=arrivals, config=config)
        assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("arrivals", "tiles", "inner", "expected"),
    [
        (torch.zeros(6), 6, [128, 192], 4),
        (torch.zeros(6), 7, [128], 1),  # more tiles than zeros
        (None, 1, [128], 1),
        (torch.zeros(6), 6, [128, 96], 1),  # 96 has no four parts of whole 16s
    ],
)
def test_tiles_are_shared_where_all_terms_have_such_parts(
    arrivals: Tensor | None, tiles: int, inner: list[int], expected: int
) -> None:
    blocks = {"SPLITS": 4, "BLOCK_M": 16}
    assert splits.splits_of(blocks, arrivals, tiles, inner) == expected
    assert blocks == {"BLOCK_M": 16}


def table_of(**entries: Mapping[str, Any]) -> Table:
    return Table("own", "own", None, None, {k: [Entry(None, None, v)] for k, v in entries.items()})


def test_a_table_says_which_tiles_are_shared(device: torch.device) -> None:
    """In operations that bring zeros, and in no others: rows that are chosen take tiles alone."""
    shared = table_of(
        choice_scattered={"by": "few_rows"},
        add_terms=TERMS,
        add_terms_split={**TERMS, "SPLITS": 2},
        linear_rows=ROWS,
        linear_rows_split={**ROWS, "SPLITS": 2},
    )
    [term], arrivals = terms_of(8, [96], device, torch.float32), zeros(device)
    index = torch.arange(8, dtype=torch.int32, device=device)
    for by, places in (("few_rows", index), ("row_gemm", None)):
        h = exact(8, WIDTH, seed=3).float().to(device)
        with tuning.table(shared), recording() as account:
            for given in (arrivals, None):
                if by == "few_rows":
                    compiled.add_terms_(h, [term], index=places, arrivals=given)
                else:
                    compiled._add_term(h, term, places, 1.0, None, by, given)
        assert [launch.arguments["SPLITS"] for launch in account.launches] == [2, 1]
    assert not arrivals.any()


def test_nothing_is_shared_until_it_was_timed() -> None:
    for kernel in ("add_terms", "linear_rows"):
        assert tuning.config_for(f"{kernel}_split", CPU, 64, (4096, 11008)) == {"SPLITS": 1}


@pytest.mark.parametrize(("kernel", "rows"), [("add_terms_split", 16), ("linear_rows_split", 64)])
def test_candidates_are_a_short_list(kernel: str, rows: int) -> None:
    """What is in use first, and no other kernel's."""
    shape = (4096, 11008)
    offered = tune.candidates_of(Question(kernel, rows, shape), {"SPLITS": 1})
    assert offered[0] == {"SPLITS": 1} and 2 < len(offered) < 13
    for config in offered[1:]:
        assert ("GROUP" in config) == (kernel == "linear_rows_split")
        fitting = splits.splits_of({**config}, zeros(CPU), 64, shape[1:])
        assert fitting == config["SPLITS"] > 1
