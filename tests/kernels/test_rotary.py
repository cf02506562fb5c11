"""The RoPE and append kernel against its torch form and fp64: all of the cache's memory."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastskip.kernels.launch import recording
from fastskip.kernels.rotary import candidates, rotate_append
from fastskip.ops import fused
from fastskip.ops.contracts import HeadNorms, Linear, Norm, Pages, Projection, Rotation, Targets
from tests.budget import assert_within_budget
from tests.kernels.paging import build_pages, exact
from tests.kernels.sublayers import Place, head_norms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPACITY = (70, 200)
POSITIONS = 16


@dataclass(frozen=True)
class Case:
    """Rows of two sequences, one of them without an entry, on both sides of page borders."""

    queries: int
    groups: int
    head_dim: int
    has_rotation: bool = True
    has_pages: bool = True
    rows: int = 5
    has_norms: bool = False

    def heads(self) -> Tensor:
        total = self.queries + 2 * self.groups * self.has_pages
        return exact(self.rows, total, self.head_dim, seed=1)

    def projection(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Projection:
        def integers(*values: int) -> Tensor:
            return torch.tensor(values[: self.rows], dtype=torch.int32, device=device)

        targets = Targets(
            integers(7, 0, 3, 15, 2), integers(1, 0, 1, 0, 1), integers(63, 64, -1, 2, 130)
        )
        angles = exact(POSITIONS, self.head_dim // 2, seed=2).float()
        cosine, sine = (part.bfloat16().to(device, dtype) for part in (angles.cos(), angles.sin()))
        pages = build_pages(
            CAPACITY, groups=self.groups, head_dim=self.head_dim, dtype=dtype, device=device
        )
        # Only the number of rows of the weight is looked at.
        total = self.heads().shape[1] * self.head_dim
        none = torch.empty(0, dtype=dtype, device=device)
        return Projection(
            Norm(none, 1e-5),
            Linear(torch.empty(total, 0, dtype=dtype, device=device)),
            Rotation(cosine, sine) if self.has_rotation else None,
            targets,
            pages if self.has_pages else None,
            self.head_dim,
            head_norms=self.norms(Place(dtype, torch.device(device))) if self.has_norms else None,
        )

    def norms(self, place: Place) -> HeadNorms:
        return head_norms(place, self.head_dim, seed=3)


def memory(pages: Pages | None) -> Tensor:
    assert pages is not None
    return torch.cat([slab.flatten() for slab in pages.slabs])


def assert_same_memory(actual: Projection, eager: Projection, truth: Projection) -> None:
    """Entries within budget, and nothing else written."""
    slots = [memory(each.pages) for each in (actual, eager, truth)]
    written = ~slots[2].isnan()
    assert written.any()
    assert torch.equal(~slots[0].isnan().cpu(), written)
    ours, theirs, true = (each[written.to(each.device)] for each in slots)
    assert_within_budget("entries", ours, theirs, true)


CASES = {
    "grouped": Case(6, 2, 16),
    "multi-head, odd": Case(3, 3, 80),
    "entries only": Case(0, 2, 16),
    "queries only": Case(3, 1, 48, has_pages=False),
    "no rotation": Case(4, 2, 32, has_rotation=False),
    "one row": Case(2, 1, 64, rows=1),
    "norms": Case(6, 2, 16, has_norms=True),
    "norms, odd": Case(3, 3, 80, has_norms=True),
    "norms, entries only": Case(0, 2, 16, has_norms=True),
    "norms, queries only": Case(3, 1, 48, has_pages=False, has_norms=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_rotate_append(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    truth = case.heads()
    actual, eager, true = (
        case.projection(dtype, device),
        case.projection(dtype, device),
        case.projection(torch.float64),
    )
    # Part of the wider output of a merged product.
    rows, total, size = truth.shape
    wide = torch.full((rows, total * size + 8), float("nan"), dtype=dtype, device=device)
    heads = wide[:, : total * size].view(truth.shape)
    heads.copy_(truth)
    expected = fused.rotate_append(heads.clone(), eager)
    exact_queries = fused.rotate_append(truth, true)
    found = rotate_append(heads, actual, config={"BLOCK_H": 4, "num_warps": 4})

    assert found.shape == (rows, case.queries, size)
    assert wide[:, total * size :].isnan().all()
    if case.queries:
        assert found.data_ptr() == heads.data_ptr()
        assert_within_budget("queries", found, expected, exact_queries)
    if case.has_pages:
        assert_same_memory(actual, eager, true)


@pytest.mark.parametrize("name", CASES)
def test_no_rows(name: str, device: torch.device) -> None:
    case = CASES[name]
    projection = Case(
        case.queries, case.groups, case.head_dim, case.has_rotation, case.has_pages, rows=0
    ).projection(torch.float32, device)
    heads = case.heads()[:0].float().to(device)
    assert rotate_append(heads, projection).shape == (0, case.queries, case.head_dim)


@pytest.mark.parametrize("leaves_all", [False, True])
@pytest.mark.parametrize(
    "name", ["grouped", "entries only", "queries only", "no rotation", "norms"]
)
def test_rows_that_do_not_run(name: str, leaves_all: bool, device: torch.device) -> None:
    case = CASES[name]
    runs = torch.tensor([1, 0, 1, 0, 1], dtype=torch.int32, device=device)
    ours, theirs = (case.projection(torch.float32, device) for _ in range(2))
    ours = replace(ours, leaves_all=leaves_all)
    heads = case.heads().float().to(device)
    if not leaves_all:
        slots = torch.where(runs.bool(), theirs.targets.slots, -1)
        theirs = replace(theirs, targets=replace(theirs.targets, slots=slots))
    expected = fused.rotate_append(heads.clone(), theirs)
    before = heads.clone()
    found = rotate_append(heads, ours, runs=runs, config={"BLOCK_H": 4, "num_warps": 4})
    torch.testing.assert_close(found[::2], expected[::2])
    assert torch.equal(heads[1::2], before[1::2])
    if case.has_pages:
        torch.testing.assert_close(memory(ours.pages), memory(theirs.pages), equal_nan=True)


def test_values_do_not_turn(device: torch.device) -> None:
    """Not even by an angle of zero, which would carry an infinity over to the other half."""
    case = Case(0, 1, 16, rows=1)
    projection = case.projection(torch.float32, device)
    heads = torch.ones(1, 2, 16, device=device)
    heads[0, 1, 0] = float("inf")
    rotate_append(heads, projection)
    stored = memory(projection.pages)
    assert stored.isinf().sum() == 1 and (~stored.isnan()).sum() == 32


def test_never_two_warps_where_heads_are_summed(device: torch.device) -> None:
    """Triton 3.6 miscompiles some reductions there."""
    case = Case(4, 2, 16, has_norms=True)
    projection = case.projection(torch.float32, device)
    with recording() as account:
        for warps in (1, 2, 4, 8):
            config = {"BLOCK_H": 4, "num_warps": warps}
            rotate_append(case.heads().float().to(device), projection, config=config)
    assert [launch.options["num_warps"] for launch in account.launches] == [4, 4, 4, 8]


def test_gradients_are_refused(device: torch.device) -> None:
    case = Case(1, 1, 16)
    heads = case.heads().float().to(device).requires_grad_()
    with pytest.raises(ValueError, match="heads: requires a gradient"):
        rotate_append(heads, case.projection(torch.float32, device))


@pytest.mark.parametrize("shape", [(32, 32, 128), (14, 2, 64), (0, 2, 16), (4, 0, 16)])
def test_there_are_candidates(shape: tuple[int, int, int]) -> None:
    assert candidates(640, shape)
