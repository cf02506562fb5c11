"""The fused projection against its torch form and fp64: queries, and all of the cache's memory."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels.launch import recording
from fastskip.kernels.numerics import INTERPRETED
from fastskip.kernels.projection import candidates, project_append
from fastskip.kernels.tuning import config_for
from fastskip.ops import fused
from fastskip.ops.contracts import Projection
from tests.budget import assert_within_budget
from tests.kernels.paging import exact
from tests.kernels.reads import watched
from tests.kernels.sublayers import (
    ALL,
    APART,
    CONFIGS,
    DTYPES,
    GUARDED,
    GUARDED_FORMS,
    NONE,
    SOME,
    STREAM,
    STREAM_2,
    STREAM_4,
    TENSOR,
    TRUTH,
    Place,
    ProjectionCase,
    assert_same_entries,
    memory,
)

CPU = torch.device("cpu")
GROUPED = ProjectionCase(4, 2, 16, 96)
CASES = {
    "multi-head, odd": ProjectionCase(3, 3, 80, 100),
    "entries only": ProjectionCase(0, 2, 32, 64),
    "queries only": ProjectionCase(3, 1, 16, 64, has_pages=False),
    "no rotation, LayerNorm, biases": ProjectionCase(
        2, 2, 48, 72, has_rotation=False, has_bias=True, is_centred=True
    ),
    "biases": ProjectionCase(4, 1, 64, 128, has_bias=True),
}


def check(
    cases: list[ProjectionCase],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    config: Mapping[str, int] | None,
    index: Tensor | None = None,
) -> None:
    h = exact(16 if index is not None else rows, cases[0].width, seed=20)

    def run(place: Place, *, is_kernel: bool = False) -> tuple[list[Projection], list[Tensor]]:
        projections = [case.build(rows, place, seed=7 * i) for i, case in enumerate(cases)]
        x = h.to(place.device, place.dtype)
        chosen = None if index is None else index.to(place.device)
        if is_kernel:
            return projections, project_append(x, projections, index=chosen, config=config)
        return projections, fused.project_append(x, projections, index=chosen)

    ours, actual = run(Place(dtype, device), is_kernel=True)
    theirs, eager = run(Place(dtype, torch.device("cpu")))
    true, truth = run(Place(TRUTH, torch.device("cpu")))
    for number, found in enumerate(actual):
        assert found.shape == truth[number].shape
        if found.numel():
            assert_within_budget("queries", found.cpu(), eager[number], truth[number])
        pages = [each[number].pages for each in (ours, theirs, true)]
        if all(each is not None for each in pages):
            assert_same_entries(*pages)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forms_and_dtypes(
    config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    check([GROUPED], 5 if config["BLOCK_N"] > 1 else 2, dtype, device, config)


@pytest.mark.parametrize("config", [STREAM_4, TENSOR], ids=["stream", "tensor"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_models(case: ProjectionCase, config: Mapping[str, int], device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check([case], 3, dtype, device, {**config, "BLOCK_M": 64})


@pytest.mark.parametrize("config", [STREAM, STREAM_4, TENSOR, APART], ids=str)
def test_index(config: Mapping[str, int], device: torch.device) -> None:
    check([GROUPED], 3, torch.bfloat16, device, config, torch.tensor([9, 2, 14]).int())


@pytest.mark.parametrize("config", [STREAM_4, TENSOR, APART], ids=str)
@pytest.mark.parametrize("is_centred", [False, True])
def test_pair(config: Mapping[str, int], is_centred: bool, device: torch.device) -> None:
    case = replace(GROUPED, has_bias=is_centred, is_centred=is_centred)
    check([case, case], 4, torch.float16, device, config)


def test_pair_without_entries(device: torch.device) -> None:
    case = replace(GROUPED, has_pages=False)
    check([case, case], 2, torch.float32, device, STREAM_4)


def test_pair_of_two_shapes(device: torch.device) -> None:
    check([GROUPED, replace(GROUPED, queries=2)], 2, torch.float32, device, STREAM_4)


@pytest.mark.parametrize("rows", [0, 1, 3, 6])
def test_table(rows: int, device: torch.device) -> None:
    """What the table of this device says, for each bucket."""
    if rows:
        check([GROUPED], rows, torch.bfloat16, device, None)
    else:
        place = Place(torch.bfloat16, device)
        projection = GROUPED.build(0, place)
        assert project_append(place.numbers(0, 96, seed=0), [projection])[0].shape == (0, 4, 16)


def test_more_rows_than_a_tile(device: torch.device) -> None:
    case = replace(GROUPED, has_pages=False, has_rotation=False)
    h = exact(19, 96, seed=3)
    found = []
    for dtype in (torch.float32, TRUTH):
        place = Place(dtype, torch.device("cpu"))
        found.append(fused.project_append(h.to(dtype), [case.build(6, place)])[0])
    place = Place(torch.float32, device)
    actual = project_append(h.to(device, torch.float32), [case.build(6, place)], config=TENSOR)[0]
    assert_within_budget("queries", actual.cpu(), *found)


CHOSEN = {
    # Tiles of queries end within a tile, which keys share.
    "odd": ProjectionCase(3, 1, 48, 96),
    "no entries of idle rows": replace(GROUPED, leaves_all=False),
    "queries only": replace(GROUPED, has_pages=False),
    "LayerNorm, biases": replace(GROUPED, has_bias=True, is_centred=True, has_rotation=False),
}


def check_chosen(
    case: ProjectionCase, config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Like ``check``, for some of the rows: nothing is stored for the others."""
    h, rows = exact(5, 96, seed=20), torch.tensor(SOME).bool()
    found: list[tuple[Any, Tensor]] = []
    for place in (Place(dtype, device), Place(dtype, CPU), Place(TRUTH, CPU)):
        own, x, chosen = case.build(5, place), h.to(place.device, place.dtype), place.chosen(SOME)
        if found:
            (queries,) = fused.project_append(x, [own], chosen=chosen)
        else:
            (queries,) = project_append(x, [own], chosen=chosen, config=config)
        found.append((own.pages, queries.cpu()))
    assert_within_budget("queries", *(queries[rows] for _, queries in found))
    assert found[0][1][~rows].isnan().all()
    if case.has_pages:
        assert_same_entries(*(pages for pages, _ in found))


@pytest.mark.parametrize(("config", "dtype"), GUARDED_FORMS)
def test_chosen_rows(config: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
    check_chosen(CHOSEN["odd"], config, dtype, device)


@pytest.mark.parametrize("config", ["stream", "tensor"])
@pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)
def test_chosen_rows_of_models(case: ProjectionCase, config: str, device: torch.device) -> None:
    check_chosen(case, GUARDED[config], torch.bfloat16, device)


@pytest.mark.parametrize(("config", "dtype"), GUARDED_FORMS)
@pytest.mark.parametrize("leaves_all", [True, False])
def test_all_rows_or_none(
    leaves_all: bool, config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """All: the bits of a launch without flags. None: entries if all leave some, nothing else."""
    place = Place(dtype, device)
    h = place.numbers(5, 96, seed=20)
    plain, guarded, idle = (replace(GROUPED, leaves_all=leaves_all).build(5, place) for _ in "123")
    assert plain.pages is not None and guarded.pages is not None and idle.pages is not None
    (right,) = project_append(h, [plain], config=config)
    (queries,) = project_append(h, [guarded], chosen=place.chosen(ALL), config=config)
    assert torch.equal(queries, right)
    entries = memory(plain.pages).nan_to_num(7.0)
    assert torch.equal(memory(guarded.pages).nan_to_num(7.0), entries)

    # The weights of what nobody needs: all, or those of the queries.
    unread = idle.linear.weight[: idle.heads * idle.head_dim] if leaves_all else idle.linear.weight
    unread.fill_(float("nan"))
    with watched(unread) as reads:
        (queries,) = project_append(h, [idle], chosen=place.chosen(NONE), config=config)
    assert queries.isnan().all() and reads == [0]
    left = memory(idle.pages)
    assert torch.equal(left.nan_to_num(7.0), entries) if leaves_all else left.isnan().all()


def test_busy_rows_read_weights(device: torch.device) -> None:
    """What is watched is seen."""
    place = Place(torch.float32, device)
    own = GROUPED.build(2, place)
    with watched(own.linear.weight) as reads:
        project_append(
            place.numbers(2, 96, seed=0), [own], chosen=place.chosen((0, 1)), config=STREAM_2
        )
    assert reads == [own.linear.weight.numel() * INTERPRETED.value]


def test_chosen_rows_of_a_pair(device: torch.device) -> None:
    """Each block of a pair in a launch of its own."""
    place = Place(torch.float32, device)
    pair = [GROUPED.build(5, place), GROUPED.build(5, place, seed=7)]
    h, chosen = place.numbers(5, 96, seed=0), place.chosen(SOME)
    rows = torch.tensor(SOME).bool()
    with recording() as account:
        actual = project_append(h, pair, chosen=chosen, config=GUARDED["stream"])
    assert [launch.is_guarded for launch in account.launches] == [True, True]
    for found, right in zip(actual, fused.project_append(h, pair, chosen=chosen), strict=True):
        torch.testing.assert_close(found[rows], right[rows])


def test_guarded_launches_are_bounded() -> None:
    place = Place(torch.bfloat16, torch.device("meta"))
    own = replace(GROUPED.build(6, place), linear=place.linear(12288, 4096, seed=0))
    h = place.numbers(6, 4096, seed=0)
    chosen = place.chosen((1,) * 6)
    with recording(is_dry=True) as account:
        for config in (STREAM_2, {**STREAM_2, "PROGRAMS": 30}, None):
            project_append(h, [own], chosen=chosen, config=config)
        project_append(h, [own], config={**STREAM_2, "PROGRAMS": 30})
    grids = [launch.grid for launch in account.launches]
    assert grids[:2] == [(3, 384), (3, 10)] and grids[3] == (3, 384)
    assert 0 < account.guarded_programs - 3 * 394 <= 264


def test_launches(device: torch.device) -> None:
    """A pair is one launch of twice the programs; only a norm apart adds launches."""
    place = Place(torch.float32, device)
    pair = [GROUPED.build(2, place), GROUPED.build(2, place, seed=7)]
    h = place.numbers(2, 96, seed=0)
    for config, launches in ((STREAM_4, 1), (APART, 3)):
        with recording() as account:
            project_append(h, pair, config=config)
        assert len(account.launches) == launches
    with recording(is_dry=True) as account:
        project_append(h, pair[:1], config=STREAM_4)
        project_append(h, pair, config=STREAM_4)
    assert [each.grid for each in account.launches] == [(1, 4), (1, 8)]


def test_dry_on_meta() -> None:
    place = Place(torch.bfloat16, torch.device("meta"))
    projection = GROUPED.build(2, Place(torch.bfloat16, torch.device("cpu")))
    with recording(is_dry=True) as account:
        (queries,) = project_append(place.numbers(2, 96, seed=0), [projection])
    assert queries.device.type == "meta" and queries.shape == (2, 4, 16)
    assert len(account.launches) == 1


def test_gradients_are_refused(device: torch.device) -> None:
    place = Place(torch.float32, device)
    h = place.numbers(2, 96, seed=0).requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient"):
        project_append(h, [GROUPED.build(2, place)])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 33, 64, 100])
def test_candidates(rows: int) -> None:
    configs = candidates(rows, (12288, 4096))
    assert 8 <= len(configs) <= 72
    known = {*config_for("project_append", torch.device("cpu"), rows)}
    assert all({*config} - {"NORM_APART", "LONG"} == known for config in configs)
    # One program for all rows, up to a full tile.
    assert all(config["BLOCK_N"] >= min(rows, 64) for config in configs)
