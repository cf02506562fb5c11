"""Attention of a decode step against its torch form and fp64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastskip.kernels import step_attention
from fastskip.kernels.launch import recording
from fastskip.kernels.step_attention import attend_step, candidates, splits_of
from fastskip.ops import fused
from fastskip.ops.contracts import PAGE, Pages, StepReach
from tests.budget import assert_within_budget
from tests.kernels.paging import build_pages, exact, fill_pages
from tests.kernels.reads import watched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """``lengths``: of each sequence, for each of the blocks; ``most`` is what a launch is told."""

    heads: int
    groups: int
    head_dim: int
    lengths: Sequence[Sequence[int]]
    splits: int
    most: int = 640
    block: int = 32
    is_fused: int = 1

    @property
    def rows(self) -> int:
        return len(self.lengths[0])

    @property
    def config(self) -> dict[str, int]:
        programs = self.splits * self.rows * self.groups * len(self.lengths)
        return {
            "BLOCK_S": self.block,
            "STAGES": 2,
            "PROGRAMS": programs,
            "FUSED_COMBINE": self.is_fused,
            "num_warps": 4,
        }

    def queries(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        found = []
        for number, _ in enumerate(self.lengths):
            # Part of the wider output of a merged product.
            wide = exact(self.rows, self.heads + 1, self.head_dim, seed=number)
            found.append(wide.to(device, dtype)[:, : self.heads])
        return found

    def pages(self, dtype: torch.dtype, device: torch.device) -> list[Pages]:
        found = []
        for number, lengths in enumerate(self.lengths):
            # A part of every page is never written: NaN that nobody may read.
            empty = build_pages(
                [70] * self.rows if max(lengths) <= 70 else [200] * self.rows,
                groups=self.groups,
                head_dim=self.head_dim,
                dtype=dtype,
                device=device,
                layer=number,
            )
            found.append(fill_pages(empty, lengths, seed=number))
        return found

    def reach(self, device: torch.device) -> list[StepReach]:
        found = []
        for number, lengths in enumerate(self.lengths):
            extra = number + (min(lengths) > 1)
            counts = torch.tensor(lengths, dtype=torch.int32, device=device) - extra
            arrivals = torch.zeros(self.rows * self.heads, dtype=torch.int32, device=device)
            found.append(StepReach(counts, extra, self.most * self.rows, arrivals))
        return found


CASES = {
    "grouped, heads of half a product": Case(6, 2, 8, [[70, 3]], splits=2),
    "multi-head": Case(2, 2, 16, [[70, 1]], splits=2),
    "multi-head, odd": Case(1, 1, 80, [[63]], splits=4, block=16),
    "multi-head, second launch": Case(2, 2, 32, [[65]], splits=2, is_fused=0),
    "one split": Case(2, 2, 16, [[65, 130]], splits=1, block=64),
    "grouped": Case(6, 2, 16, [[70, 3]], splits=2),
    "grouped, odd": Case(7, 1, 96, [[33]], splits=4, block=16),
    "grouped, second launch": Case(3, 1, 64, [[129]], splits=2, block=64, is_fused=0),
    "grouped, one split": Case(4, 2, 16, [[65, 130]], splits=1),
    "many heads a group": Case(67, 1, 16, [[40]], splits=2),
    "more splits than blocks": Case(2, 1, 16, [[5]], splits=8),
    "pair": Case(2, 2, 16, [[70, 2], [3, 64]], splits=2),
    "grouped pair": Case(4, 2, 16, [[70, 2], [3, 64]], splits=2, is_fused=0),
    "pair of one split": Case(2, 2, 16, [[70], [3]], splits=1),
    "far more than expected": Case(1, 1, 16, [[190]], splits=4, most=40),
    "no entries": Case(2, 2, 16, [[0, 1]], splits=2),
    "no entries, grouped": Case(2, 1, 16, [[0, 1]], splits=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attend_step(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    queries, reach, pages = (
        case.queries(dtype, device),
        case.reach(device),
        case.pages(dtype, device),
    )
    scale = case.head_dim**-0.5
    with recording() as account:
        found = attend_step(queries, reach, pages, scale, config=case.config)
    launches = {launch: count for launch, (count, _) in account.by_kernel().items()}
    is_split = case.splits > 1 and case.most > case.block
    combines = {"attend_step_combine": 1} if is_split and not case.is_fused else {}
    assert launches == {"attend_step": 1} | combines

    cpu = torch.device("cpu")
    exact_pages = case.pages(torch.float64, cpu)
    eager = fused.attend_step(queries, reach, pages, scale)
    truth = fused.attend_step(case.queries(torch.float64, cpu), case.reach(cpu), exact_pages, scale)
    for number, each in enumerate(found):
        assert each.shape == (case.rows, case.heads * case.head_dim) and each.is_contiguous()
        assert_within_budget(f"block {number}", each, eager[number], truth[number])
        assert not reach[number].arrivals.any()


@pytest.mark.parametrize("name", ["multi-head", "grouped", "pair"])
def test_every_run_and_both_combines_give_the_same_bits(name: str, device: torch.device) -> None:
    case = CASES[name]
    queries, pages = case.queries(torch.bfloat16, device), case.pages(torch.bfloat16, device)
    reach = case.reach(device)
    runs = [
        attend_step(queries, reach, pages, 0.25, config={**case.config, "FUSED_COMBINE": is_fused})
        for is_fused in (1, 1, 0)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


CHOSEN = {
    "multi-head": Case(2, 2, 16, [[70, 40, 65]], splits=2),
    "multi-head, second launch": Case(2, 2, 16, [[70, 40, 65]], splits=2, is_fused=0),
    "grouped": Case(6, 2, 16, [[70, 40, 65]], splits=2),
    "grouped, second launch": Case(6, 2, 16, [[70, 40, 65]], splits=2, is_fused=0),
    "one split": Case(2, 2, 16, [[65, 40, 65]], splits=1, block=64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_sequences(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Who runs finds what it finds without flags; of the others nothing is read or written."""
    case = CHOSEN[name]
    (queries,), (pages,), (whole,) = (
        case.queries(dtype, device),
        case.pages(dtype, device),
        case.reach(device),
    )
    (right,) = attend_step([queries], [whole], [pages], 0.25, config=case.config)
    for flags in ((0, 0, 0), (1, 1, 1), (1, 0, 1)):
        runs = torch.tensor(flags, dtype=torch.int32, device=device)
        # A count of entries that were never written shows if it is read.
        counts = torch.where(runs.bool(), whole.counts, 127)
        reach = replace(whole, counts=counts, runs=runs)
        with watched(queries[1], counts) as reads, recording() as account:
            (found,) = attend_step([queries], [reach], [pages], 0.25, config=case.config)
        rows = runs.bool()
        assert torch.equal(found[rows], right[rows]) and found[~rows].isnan().all()
        assert not reach.arrivals.any()
        assert not reads[0] or flags[1]
        assert not reads[1] or any(flags)
        assert all(launch.is_guarded for launch in account.launches)


def test_arrivals_of_idle_sequences_stay(device: torch.device) -> None:
    case = CHOSEN["multi-head"]
    (queries,), (pages,), (whole,) = (
        case.queries(torch.float32, device),
        case.pages(torch.float32, device),
        case.reach(device),
    )
    reach = replace(whole, runs=torch.zeros(3, dtype=torch.int32, device=device))
    reach.arrivals.fill_(5)
    attend_step([queries], [reach], [pages], 0.25, config=case.config)
    assert (reach.arrivals == 5).all()


def test_chosen_sequences_of_a_pair_take_a_launch_each(device: torch.device) -> None:
    case = CASES["pair"]
    queries, pages = case.queries(torch.float32, device), case.pages(torch.float32, device)
    runs = torch.tensor([0, 1], dtype=torch.int32, device=device)
    reach = [replace(each, runs=runs) for each in case.reach(device)]
    with recording() as account:
        found = attend_step(queries, reach, pages, 1.0, config=case.config)
    assert [launch.is_guarded for launch in account.launches] == [True, True]
    for actual, expected in zip(found, fused.attend_step(queries, reach, pages, 1.0), strict=True):
        torch.testing.assert_close(actual[1], expected[1])


def test_counts_change_between_launches(device: torch.device) -> None:
    case = CASES["multi-head"]
    queries, pages = case.queries(torch.float32, device), case.pages(torch.float32, device)
    (reach,) = case.reach(device)
    first = attend_step(queries, [reach], pages, 1.0, config=case.config)[0]
    reach.counts.sub_(torch.tensor([40, 0], device=device))
    second = attend_step(queries, [reach], pages, 1.0, config=case.config)[0]
    expected = fused.attend_step(queries, [reach], pages, 1.0)[0]
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(second, expected)


def test_large_scores(device: torch.device) -> None:
    """Far beyond what an exponential holds: the largest score of a block wins."""
    case = CASES["multi-head"]
    queries, pages = case.queries(torch.float32, device), case.pages(torch.float32, device)
    for sign in (1e3, -1e3):
        found = attend_step(queries, case.reach(device), pages, sign, config=case.config)[0]
        expected = fused.attend_step(queries, case.reach(device), pages, sign)[0]
        torch.testing.assert_close(found, expected)


def test_no_rows(device: torch.device) -> None:
    pages = build_pages([1], groups=1, head_dim=16, dtype=torch.float32, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    queries = torch.empty(0, 2, 16, device=device)
    assert attend_step([queries], [StepReach(none, 1, 0, none)], [pages], 1.0)[0].shape == (0, 32)


def test_blocks_of_different_sizes_take_a_launch_each(device: torch.device) -> None:
    wide, narrow = Case(2, 2, 16, [[70]], 2), Case(2, 1, 16, [[20]], 2)
    queries = [case.queries(torch.float32, device)[0] for case in (wide, narrow)]
    reach = [case.reach(device)[0] for case in (wide, narrow)]
    pages = [case.pages(torch.float32, device)[0] for case in (wide, narrow)]
    with recording() as account:
        found = attend_step(queries, reach, pages, 1.0, config=wide.config)
    assert account.by_kernel()["attend_step"][0] == 2
    for actual, expected in zip(found, fused.attend_step(queries, reach, pages, 1.0), strict=True):
        torch.testing.assert_close(actual, expected)


def test_tensors_without_data() -> None:
    meta = torch.device("meta")
    table = torch.empty(3, 11, dtype=torch.int64, device=meta)
    anchor = torch.empty(16, dtype=torch.bfloat16, device=meta)
    numbers = torch.empty(3 * 32, dtype=torch.int32, device=meta)
    reach = StepReach(numbers[:3], 1, 3 * 640, numbers)
    queries = torch.empty(3, 32, 128, dtype=torch.bfloat16, device=meta)
    pages = Pages(anchor, table, 0, 32, 128, [])
    with recording(is_dry=True) as account:
        attend_step([queries] * 2, [reach] * 2, [pages] * 2, 0.1)
    assert [launch.grid for launch in account.launches] == [(96, 1, 2)]


@pytest.mark.parametrize(
    ("lanes", "entries", "splits"),
    [(32, 640, 8), (40, 640, 4), (512, 640, 1), (2, 640, 16), (2, 10**6, 32), (0, 0, 1)],
)
def test_splits(lanes: int, entries: int, splits: int) -> None:
    assert splits_of(lanes, entries, {"PROGRAMS": 264, "BLOCK_S": 32}) == splits


def test_gradients_are_refused(device: torch.device) -> None:
    case = CASES["pair"]
    queries = case.queries(torch.float32, device)
    queries[1].requires_grad_()
    pages = case.pages(torch.float32, device)
    with pytest.raises(ValueError, match=r"queries\[1\]: requires a gradient"):
        attend_step(queries, case.reach(device), pages, 1.0)


@pytest.mark.parametrize("shape", [(32, 32, 128), (14, 2, 64)])
@pytest.mark.parametrize("rows", [1, 16])
def test_candidates_fit_pages(rows: int, shape: tuple[int, int, int]) -> None:
    found = candidates(rows, shape)
    assert 4 <= len(found) <= 48
    assert all(PAGE % config["BLOCK_S"] == 0 for config in found)
    assert step_attention.MOST_SPLITS & (step_attention.MOST_SPLITS - 1) == 0
