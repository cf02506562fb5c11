"""Attention of prompts against its torch form and fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels.launch import recording
from fastskip.kernels.row_attention import attend_rows, candidates, tile_of
from fastskip.ops import fused
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import PAGE, Bounds, Pages, Reach
from tests.budget import assert_within_budget
from tests.kernels.paging import build_pages, exact, fill_pages

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIG = {"BLOCK_Q": 16, "BLOCK_S": 32, "STAGES": 2, "num_warps": 4}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """``limits``: those of each sequence's rows, ascending; rows are stored in another order."""

    heads: int
    groups: int
    head_dim: int
    limits: Sequence[Sequence[int]]
    block: int = 32

    @property
    def rows(self) -> int:
        return sum(map(len, self.limits))

    @property
    def config(self) -> dict[str, int]:
        return {**CONFIG, "BLOCK_S": self.block}

    def queries(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        # Part of the wider output of a merged product.
        wide = exact(self.rows, self.heads + 2, self.head_dim, seed=3).to(device, dtype)
        return wide[:, : self.heads]

    def pages(self, dtype: torch.dtype, device: torch.device) -> Pages:
        lengths = [max(own, default=0) for own in self.limits]
        # Slots after the last one that is seen hold NaN.
        pages = build_pages(
            lengths, groups=self.groups, head_dim=self.head_dim, dtype=dtype, device=device
        )
        return fill_pages(pages, lengths)

    def reach(self, device: torch.device) -> Reach:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(1))
        limits = torch.zeros(self.rows, dtype=torch.int32)
        ascending = [limit for own in self.limits for limit in own]
        limits[order] = torch.tensor(ascending, dtype=torch.int32)
        bounds = [0]
        for own in self.limits:
            bounds.append(bounds[-1] + len(own))
        return Reach(limits.to(device), order.to(device, torch.int32), Bounds.of(bounds, device))


TEXT = [*range(1, 6), *range(70, 90)]
"""Text rows around an image: they see its entries, and its own rows are not asked."""

CASES = {
    "heads of half a product": Case(1, 1, 8, [range(1, 41)]),
    "causal": Case(1, 1, 16, [range(1, 41)]),
    "text over image": Case(2, 1, 32, [TEXT]),
    "several sequences": Case(1, 1, 16, [range(1, 18), [], [3], [], range(60, 70), []], block=16),
    "one row": Case(2, 2, 64, [[65]], block=64),
    "grouped, odd": Case(3, 1, 80, [range(30, 36)], block=64),
    "odd": Case(2, 2, 96, [[1, 31, 32, 33, 64]]),
    "equal limits": Case(1, 1, 128, [[64] * 17]),
    "offset rows": Case(1, 1, 16, [[130], range(64, 69)], block=64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attend_rows(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    scale = case.head_dim**-0.5
    given = case.queries(dtype, device), case.reach(device), case.pages(dtype, device)
    with recording() as account:
        found = attend_rows(*given, scale, config=case.config)
    block = CONFIG["BLOCK_Q"]
    tiles = (case.rows + min(case.rows, len(case.limits)) * (block - 1)) // block
    assert tiles >= sum(-(-len(own) // block) for own in case.limits)
    assert account.by_kernel() == {"attend_rows": (1, tiles * case.heads)}
    eager = fused.attend_rows(*given, scale)
    double = torch.float64
    truth = fused.attend_rows(
        case.queries(double, CPU), case.reach(CPU), case.pages(double, CPU), scale
    )
    assert found.shape == (case.rows, case.heads * case.head_dim) and found.is_contiguous()
    assert_within_budget("out", found, eager, truth)


@pytest.mark.parametrize("limits", [[0, 0, 1, 40], [0] * 3])
def test_rows_without_entries_give_zero(limits: list[int], device: torch.device) -> None:
    case = Case(2, 1, 16, [limits])
    reach, dtype = case.reach(device), torch.float32
    queries, pages = case.queries(dtype, device), case.pages(dtype, device)
    found = attend_rows(queries, reach, pages, 1.0, config=CONFIG)
    expected = fused.attend_rows(queries, reach, pages, 1.0)
    # The torch form divides zero by zero where another row of the sequence has entries.
    torch.testing.assert_close(found, expected.nan_to_num())
    assert not found[reach.limits == 0].any()


RUNNING: dict[str, Callable[[int], Tensor]] = {
    "every third": lambda rows: torch.arange(rows) % 3 == 1,
    "some tiles": lambda rows: torch.arange(rows) % 40 < 5,
    "last": lambda rows: torch.arange(rows) == rows - 1,
    "all": lambda rows: torch.ones(rows, dtype=torch.bool),
    "none": lambda rows: torch.zeros(rows, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("running", RUNNING)
@pytest.mark.parametrize("name", ["causal", "text over image", "several sequences", "grouped, odd"])
def test_rows_that_do_not_run(
    name: str, running: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Whatever their limits: in the order of a tile they need not ascend."""
    case = CASES[name]
    by_order = RUNNING[running](case.rows)

    def given(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Reach, Pages]:
        reach = case.reach(device)
        runs = torch.zeros(case.rows, dtype=torch.int32, device=device)
        runs[reach.order.long()] = by_order.to(device, torch.int32)
        idle = ~runs.bool()
        limits = torch.where(idle & (torch.arange(case.rows, device=device) % 2 > 0), 0, 10**6)
        limits = torch.where(idle, limits, reach.limits).to(torch.int32)
        queries, pages = case.queries(dtype, device).clone(), case.pages(dtype, device)
        queries[idle] = float("nan")
        return queries, replace(reach, limits=limits, runs=runs), pages

    scale = case.head_dim**-0.5
    ours, truth = given(dtype, device), given(torch.float64, CPU)
    with poisoned():
        found = attend_rows(*ours, scale, config=case.config)
    rows = truth[1].runs
    assert rows is not None
    does = rows.bool().to(device)
    assert found[~does].isnan().all(), "not written"
    if does.any():
        eager, true = fused.attend_rows(*ours, scale), fused.attend_rows(*truth, scale)
        assert_within_budget("out", found[does], eager[does], true[does.cpu()])


def test_rows_that_run_without_entries_give_zero(device: torch.device) -> None:
    case = Case(2, 1, 16, [[0, 0, 0]])
    runs = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    reach = replace(case.reach(device), runs=runs)
    queries, pages = case.queries(torch.float32, device), case.pages(torch.float32, device)
    with poisoned():
        found = attend_rows(queries, reach, pages, 1.0, config=CONFIG)
    assert not found[::2].any() and found[1].isnan().all()


def test_large_scores(device: torch.device) -> None:
    case = CASES["text over image"]
    queries, reach = case.queries(torch.float32, device), case.reach(device)
    pages = case.pages(torch.float32, device)
    for scale in (1e3, -1e3):
        found = attend_rows(queries, reach, pages, scale, config=CONFIG)
        torch.testing.assert_close(found, fused.attend_rows(queries, reach, pages, scale))


def test_every_run_gives_the_same_bits(device: torch.device) -> None:
    case = CASES["text over image"]
    given = case.queries(torch.bfloat16, device), case.reach(device)
    pages = case.pages(torch.bfloat16, device)
    runs = [attend_rows(*given, pages, 0.25, config=CONFIG) for _ in range(2)]
    assert torch.equal(*runs)


def test_no_rows(device: torch.device) -> None:
    case = Case(2, 1, 16, [[], []])
    none = torch.empty(0, dtype=torch.int32, device=device)
    pages = case.pages(torch.float32, device)
    for bounds in ((0, 0, 0), (0,)):
        reach = Reach(none, none, Bounds.of(bounds, device))
        queries = torch.empty(0, 2, 16, device=device)
        assert attend_rows(queries, reach, pages, 1.0).shape == (0, 32)


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    bounds_ptr, found_ptr, sequences, BLOCK_B: tl.constexpr
):
    tile = tl.program_id(0)
    sequence, first, last = tile_of(tile, bounds_ptr, sequences, 2, BLOCK_B)
    tl.store(found_ptr + 3 * tile, sequence)
    tl.store(found_ptr + 3 * tile + 1, first)
    tl.store(found_ptr + 3 * tile + 2, last)


def test_tiles(device: torch.device) -> None:
    """Each row is in one tile; of a sequence the last rows come first."""
    bounds = Bounds.of((0, 0, 5, 5, 6), device)
    found = torch.empty(7, 3, dtype=torch.int32, device=device)
    _tiles_kernel[(7,)](bounds.device, found, bounds.sequences, BLOCK_B=4)
    own, others = found[:4].tolist(), found[4:]
    assert own == [[1, 4, 5], [1, 2, 4], [1, 0, 2], [3, 5, 6]]
    assert torch.equal(others[:, 1], others[:, 2])


def test_rows_of_no_sequence(device: torch.device) -> None:
    """Rows behind the last sequence are neither read nor written."""
    case = CASES["several sequences"]
    dtype, reach = torch.float32, case.reach(device)
    some = replace(reach, bounds=Bounds.of((0, 17, 17, 18), device))
    queries, pages = case.queries(dtype, device).clone(), case.pages(dtype, device)
    idle = reach.order[18:].long()
    queries[idle] = float("nan")
    with poisoned():
        found = attend_rows(queries, some, pages, 0.25, config=case.config)
    expected = fused.attend_rows(case.queries(dtype, device), reach, pages, 0.25)
    rest = reach.order[:18].long()
    assert found[idle].isnan().all()
    torch.testing.assert_close(found[rest], expected[rest])


def test_tensors_without_data() -> None:
    meta = torch.device("meta")
    numbers = torch.empty(640, dtype=torch.int32, device=meta)
    table = torch.empty(1, 11, dtype=torch.int64, device=meta)
    anchor = torch.empty(16, dtype=torch.bfloat16, device=meta)
    queries = torch.empty(640, 32, 128, dtype=torch.bfloat16, device=meta)
    with recording(is_dry=True) as account:
        attend_rows(
            queries,
            Reach(numbers, numbers, Bounds((0, 640), numbers[:2])),
            Pages(anchor, table, 0, 32, 128, []),
            1,
        )
    assert [launch.grid for launch in account.launches] == [(10, 32)]


def test_gradients_are_refused(device: torch.device) -> None:
    case = CASES["one row"]
    queries = case.queries(torch.float32, device).requires_grad_()
    with pytest.raises(ValueError, match="queries: requires a gradient"):
        attend_rows(queries, case.reach(device), case.pages(torch.float32, device), 1.0)


@pytest.mark.parametrize("shape", [(32, 32, 128), (14, 2, 64)])
@pytest.mark.parametrize("rows", [64, 640])
def test_candidates_fit_pages(rows: int, shape: tuple[int, int, int]) -> None:
    found = candidates(rows, shape)
    assert 8 <= len(found) <= 24
    assert all(PAGE % config["BLOCK_S"] == 0 for config in found)
