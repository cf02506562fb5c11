"""Operations on chosen rows of which the host knows a bound: library products of compacted rows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels.addition import add_rows_
from fastskip.kernels.compaction import compact
from fastskip.kernels.launch import recording
from fastskip.ops import allocate, compiled
from fastskip.ops.contracts import Activation, Term
from fastskip.ops.operations import FusedOperations
from fastskip.ops.routes import Chosen, Switch
from tests.kernels.sublayers import (
    FeedCase,
    Place,
    ProjectionCase,
    assert_same_entries,
    memory,
)
from tests.kernels.test_compiled import (
    DTYPES,
    ROWS,
    RUNS,
    WIDTH,
    check_some,
    rows_that,
)

BOUNDS = [
    (runs, bound) for runs in RUNS for bound in range(1, ROWS + 1) if sum(RUNS[runs]) <= bound
]


@pytest.fixture(autouse=True)
def by_the_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rows are many here; and nobody else computes."""
    monkeypatch.setattr(compiled, "FEW_CHOSEN", 0)
    with recording() as account, allocate.poisoned():
        yield
    names = set(account.by_kernel())
    assert not names & {"linear_rows", "project_append", "feed", "add_terms"}


def choose(ops: FusedOperations, place: Place, runs: str, bound: int) -> Chosen:
    chosen = ops.choose_rows(place.integers(*RUNS[runs])).at_most(bound)
    assert chosen.index is not None and chosen.index.shape == (bound,)
    return chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("runs", "bound"), BOUNDS)
@pytest.mark.parametrize(
    ("case", "turns"),
    [
        (ProjectionCase(4, 2, 16, WIDTH, has_bias=True), True),
        (ProjectionCase(4, 2, 16, WIDTH), False),
        (ProjectionCase(4, 2, 16, WIDTH, has_pages=False), False),
        (ProjectionCase(4, 2, 16, WIDTH, has_head_norms=True), True),
    ],
    ids=("turning", "not turning", "queries alone", "norms of heads"),
)
def test_queries_lie_where_their_rows_do(
    case: ProjectionCase,
    turns: bool,
    runs: str,
    bound: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    made_pages: list[Any] = []

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        own = replace(case.build(ROWS, place), leaves_all=False)
        own = own if turns else replace(own, rotation=None)
        made_pages.append(own.pages)
        h = place.numbers(ROWS, WIDTH, seed=20)
        (found,) = ops.project_append(h, [own], chosen=choose(ops, place, runs, bound))
        assert found.shape == (ROWS, 4, 16)
        return [found[rows_that(RUNS[runs])]]

    check_some("queries", made, dtype, device)
    if case.has_pages and runs != "none":
        assert_same_entries(*made_pages)
    elif case.has_pages:
        assert memory(made_pages[0]).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(("runs", "bound"), BOUNDS)
def test_an_ffn(
    activation: Activation, runs: str, bound: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Its inner rows lie in the order of the index; rows that do not run stay as they are."""
    case = FeedCase(24, WIDTH, activation, has_bias=activation is Activation.RELU)

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, down = place.numbers(ROWS, WIDTH, seed=20), place.linear(WIDTH, 24, seed=3)
        before, chosen = h.clone(), choose(ops, place, runs, bound)
        (fed,) = ops.feed(h, [case.build(place)], chosen=chosen)
        assert fed.shape == (bound, 24)
        assert ops.add_terms_(h, [Term(fed, down)], chosen=[chosen], factor=0.5) is h
        idle = [row for row in range(ROWS) if row not in rows_that(RUNS[runs])]
        assert torch.equal(h[idle], before[idle])
        return [fed[: len(rows_that(RUNS[runs]))], h]

    check_some("ffn", made, dtype, device)


@pytest.mark.parametrize("runs", RUNS)
def test_both_halves_of_a_parallel_block(runs: str, device: torch.device) -> None:
    heads, ffn = ProjectionCase(4, 2, 16, WIDTH), FeedCase(24, WIDTH)

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        own, part = replace(heads.build(ROWS, place), leaves_all=False), ffn.build(place, seed=7)
        h, chosen = place.numbers(ROWS, WIDTH, seed=20), choose(ops, place, runs, ROWS)
        queries, fed = ops.project_append_feed(h, own, part, chosen=(chosen, chosen))
        assert chosen.index is not None
        terms = [
            Term(
                place.numbers(ROWS, 64, seed=5)[chosen.index.long()],
                place.linear(WIDTH, 64, seed=4),
            ),
            Term(fed, place.linear(WIDTH, 24, seed=3)),
        ]
        ops.add_terms_(h, terms, chosen=[chosen, chosen])
        return [queries[rows_that(RUNS[runs])], h]

    check_some("parallel", made, torch.float32, device)


@pytest.mark.parametrize("size", (0, 1, 33, 70))
def test_an_index_names_every_row(size: int, device: torch.device) -> None:
    """Products may read all of it, whatever the count."""
    mask = torch.arange(size, device=device) % 3 == 0
    index, count = compact(mask, config={"BLOCK": 32, "num_warps": 4})
    assert index.sort().values.tolist() == list(range(size))
    assert mask[index[int(count) :].long()].sum() == 0


@pytest.mark.parametrize("count", (0, 2, 3))
def test_rows_are_added_up_to_a_count(count: int, device: torch.device) -> None:
    h, x = torch.ones(6, 40, device=device), torch.ones(3, 40, device=device)
    x[count:] = float("nan")
    index = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    many = torch.tensor([count], dtype=torch.int32, device=device)
    add_rows_(h, x, index=index, count=many, factor=2.0)
    expected = torch.ones(6)
    expected[[4, 0, 2][:count]] = 3
    assert torch.equal(h.cpu(), expected[:, None].expand(6, 40))


def test_a_switch_is_told_to_the_kernel() -> None:
    mask = torch.zeros(640, dtype=torch.int32, device="meta")
    with recording(is_dry=True) as account:
        compiled.choose_rows(mask)
        compiled.choose_rows(mask, Switch((1 << 63) + 5, 64))
    plain, told = (launch.arguments for launch in account.launches)
    assert (plain["STEP"], plain["handle"]) == (0, 0)
    assert told["STEP"] == 64 and told["handle"] % (1 << 64) == (1 << 63) + 5
