"""The fused first half of an FFN, alone and beside the heads of a parallel block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels import parallel
from fastskip.kernels.feed import candidates, feed
from fastskip.kernels.launch import recording
from fastskip.kernels.numerics import INTERPRETED
from fastskip.kernels.parallel import project_append_feed
from fastskip.ops import fused
from fastskip.ops.contracts import Activation
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
    FeedCase,
    Place,
    ProjectionCase,
    assert_same_entries,
    memory,
)

GATED = FeedCase(40, 96)
RELU = FeedCase(72, 80, Activation.RELU, has_bias=True, is_centred=True)
CASES = {
    "gated": GATED,
    "gated, odd, biases": FeedCase(27, 100, has_bias=True),
    "ReLU": RELU,
    "ReLU, RMS": FeedCase(33, 64, Activation.RELU),
}
HEADS = ProjectionCase(4, 2, 16, 96)
CPU = torch.device("cpu")


def check(
    cases: Sequence[FeedCase],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    config: Mapping[str, int] | None,
    *,
    index: Tensor | None = None,
    has_changes: bool = False,
) -> None:
    width = cases[0].width

    def run(place: Place, *, is_kernel: bool = False) -> list[Tensor]:
        feeds = [case.build(place, seed=7 * number) for number, case in enumerate(cases)]
        h = place.numbers(rows if index is None else 16, width, seed=20)
        changes = [place.numbers(rows, width, seed=30 + i) for i in range(len(cases))]
        given = changes if has_changes else None
        chosen = None if index is None else index.to(place.device)
        if is_kernel:
            return feed(h, feeds, index=chosen, changes=given, config=config)
        return fused.feed(h, feeds, index=chosen, changes=given)

    actual = run(Place(dtype, device), is_kernel=True)
    eager, truth = run(Place(dtype, CPU)), run(Place(TRUTH, CPU))
    assert len(actual) == len(cases)
    for number, found in enumerate(actual):
        assert_within_budget("feed", found.cpu(), eager[number], truth[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forms_and_dtypes(
    config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    check([GATED], 5 if config["BLOCK_N"] > 1 else 2, dtype, device, config)


@pytest.mark.parametrize("config", [STREAM_2, TENSOR], ids=["stream", "tensor"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_models(case: FeedCase, config: Mapping[str, int], device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check([case], 3, dtype, device, config)


@pytest.mark.parametrize("config", [STREAM, STREAM_4, TENSOR, APART], ids=str)
@pytest.mark.parametrize("case", [GATED, RELU], ids=["RMS", "LayerNorm"])
def test_index_and_changes(case: FeedCase, config: Mapping[str, int], device: torch.device) -> None:
    index = torch.tensor([9, 2, 14]).int()
    check([case], 3, torch.bfloat16, device, config, index=index, has_changes=True)


@pytest.mark.parametrize("config", [STREAM_4, TENSOR, APART], ids=str)
@pytest.mark.parametrize("case", [GATED, RELU], ids=["gated", "ReLU"])
def test_pair(case: FeedCase, config: Mapping[str, int], device: torch.device) -> None:
    check([case, case], 4, torch.float16, device, config, has_changes=True)
    check([case, case], 2, torch.bfloat16, device, config)


def test_pair_of_two_kinds(device: torch.device) -> None:
    pair = [GATED, replace(GATED, activation=Activation.RELU)]
    check(pair, 2, torch.float32, device, STREAM_2, has_changes=True)


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 17, 33, 65])
def test_table(rows: int, device: torch.device) -> None:
    """What the table of this device says, for each bucket."""
    check([GATED], rows, torch.bfloat16, device, None)


@pytest.mark.parametrize("config", [STREAM_4, TENSOR], ids=["stream", "tensor"])
def test_rows_of_every_size(config: Mapping[str, int], device: torch.device) -> None:
    """fp16 rows whose squares, and whose products with the norm's weight, leave its range."""
    place, true = Place(torch.float16, device), Place(TRUTH, CPU)
    sizes = torch.tensor([1e-6, 1.0, 300.0, 30000.0])[:, None]
    h = (exact(4, 96, seed=1).clamp(-1, 1) * sizes).half()
    h[3, 5] = 60000.0
    actual = feed(h.to(device), [GATED.build(place)], config=config)[0]
    eager = fused.feed(h, [GATED.build(Place(torch.float16, CPU))])[0]
    truth = fused.feed(h.double(), [GATED.build(true)])[0]
    for row in range(4):
        assert_within_budget(f"row {row}", actual[row].cpu(), eager[row], truth[row])


def test_no_rows(device: torch.device) -> None:
    place = Place(torch.bfloat16, device)
    parts = [GATED.build(place), GATED.build(place)]
    assert [found.shape for found in feed(place.numbers(0, 96, seed=0), parts)] == [(0, 40)] * 2


@pytest.mark.parametrize(("config", "dtype"), GUARDED_FORMS)
@pytest.mark.parametrize("case", [GATED, RELU], ids=["gated", "ReLU"])
def test_chosen_rows(
    case: FeedCase, config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Nothing is stored for rows that do not run."""
    rows = torch.tensor(SOME).bool()
    found: list[Tensor] = []
    for place in (Place(dtype, device), Place(dtype, CPU), Place(TRUTH, CPU)):
        part, h = case.build(place), place.numbers(5, case.width, seed=20)
        changes, chosen = [place.numbers(5, case.width, seed=30)], place.chosen(SOME)
        if found:
            (out,) = fused.feed(h, [part], changes=changes, chosen=chosen)
        else:
            (out,) = feed(h, [part], changes=changes, chosen=chosen, config=config)
        found.append(out.cpu())
    assert_within_budget("feed", *(out[rows] for out in found))
    assert found[0][~rows].isnan().all()


@pytest.mark.parametrize(("config", "dtype"), GUARDED_FORMS)
def test_all_rows_or_none(
    config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """All: the bits of a launch without flags. None: no weight is read, nothing is written."""
    place = Place(dtype, device)
    part, h = GATED.build(place), place.numbers(5, 96, seed=20)
    (right,) = feed(h, [part], config=config)
    (out,) = feed(h, [part], chosen=place.chosen(ALL), config=config)
    assert torch.equal(out, right)
    part.linear.weight.fill_(float("nan"))
    with watched(part.linear.weight) as reads:
        (out,) = feed(h, [part], chosen=place.chosen(NONE), config=config)
    assert out.isnan().all() and reads == [0]


def test_chosen_rows_of_a_pair(device: torch.device) -> None:
    place = Place(torch.float32, device)
    pair = [GATED.build(place), GATED.build(place, seed=7)]
    h, chosen = place.numbers(5, 96, seed=0), place.chosen(SOME)
    rows = torch.tensor(SOME).bool()
    changes = [place.numbers(5, 96, seed=30 + number) for number in range(2)]
    actual = feed(h, pair, changes=changes, chosen=chosen, config=GUARDED["stream"])
    expected = fused.feed(h, pair, changes=changes, chosen=chosen)
    for found, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(found[rows], right[rows])


def test_guarded_launches_are_bounded() -> None:
    place = Place(torch.bfloat16, torch.device("meta"))
    h, chosen = place.numbers(6, 96, seed=0), place.chosen((1,) * 6)
    part, heads = FeedCase(11008, 96).build(place), HEADS.build(6, place)
    bounded = {**STREAM_2, "PROGRAMS": 30}
    with recording(is_dry=True) as account:
        feed(h, [part], chosen=chosen, config=bounded)
        project_append_feed(h, heads, part, chosen=(None, chosen), config=bounded)
        project_append_feed(h, heads, part, chosen=(chosen, None), config=bounded)
        feed(h, [part], config=bounded)
        project_append_feed(h, heads, part, config=bounded)
    grids = [launch.grid for launch in account.launches]
    assert grids == [(3, 10)] * 3 + [(3, 688), (3, 692)]
    assert account.guarded_programs == 90


def test_launches(device: torch.device) -> None:
    """A pair is one launch; only norms apart, one for each that differs, add some."""
    place = Place(torch.bfloat16, device)
    pair = [GATED.build(place), GATED.build(place, seed=7)]
    h = place.numbers(2, 96, seed=0)
    with recording(is_dry=True) as account:
        feed(h, pair, config=STREAM_4)
        feed(h, pair, config=APART)
        feed(h, [pair[0], pair[0]], config=APART)
        project_append_feed(h, HEADS.build(2, place), pair[0], config=STREAM_4)
    names = [each.name for each in account.launches]
    norm = "normalize"
    assert names == ["feed", norm, norm, "feed", norm, "feed", "project_append_feed"]
    assert [each.grid for each in account.launches if each.name != norm] == [
        (1, 6),
        (1, 4),
        (1, 4),
        (1, 7),
    ]


def test_norms_that_differ_only_in_their_biases(device: torch.device) -> None:
    """Taken apart, they are two norms although they share their weights."""
    place = Place(torch.float32, device)
    first = RELU.build(place)
    assert first.norm.bias is not None
    second = replace(first, norm=replace(first.norm, bias=first.norm.bias + 1))
    h = place.numbers(2, 80, seed=0)
    alone = feed(h, [second], config=APART)[0]
    assert torch.equal(feed(h, [first, second], config=APART)[1], alone)


def test_fp32_is_streamed(device: torch.device) -> None:
    """Matrix instructions would round fp32 to TF32."""
    place = Place(torch.float32, device)
    with recording(is_dry=True) as account:
        feed(place.numbers(5, 96, seed=0), [GATED.build(place)], config=TENSOR)
    assert account.launches[0].arguments["BLOCK_N"] == 4
    assert account.launches[0].grid == (2, 10)


def test_gradients_are_refused(device: torch.device) -> None:
    place = Place(torch.float32, device)
    h, change = place.numbers(2, 96, seed=0), place.numbers(2, 96, seed=1).requires_grad_()
    with pytest.raises(ValueError, match=r"changes\[0\]: requires a gradient"):
        feed(h, [GATED.build(place)], changes=[change])
    with pytest.raises(ValueError, match="h: requires a gradient"):
        project_append_feed(change, HEADS.build(2, place), GATED.build(place))


PARALLEL = {
    "llama": (HEADS, GATED),
    "biases of the heads": (replace(HEADS, has_bias=True), GATED),
    "LayerNorm, ReLU": (
        replace(HEADS, width=80, has_rotation=False, has_bias=True, is_centred=True),
        RELU,
    ),
    "norms of two kinds": (replace(HEADS, width=80), RELU),
    "no entries": (replace(HEADS, has_pages=False), GATED),
    "entries only": (replace(HEADS, queries=0), GATED),
}


@pytest.mark.parametrize("config", [STREAM_4, TENSOR, APART], ids=["stream", "tensor", "apart"])
@pytest.mark.parametrize("cases", PARALLEL.values(), ids=PARALLEL)
def test_parallel(
    cases: tuple[ProjectionCase, FeedCase], config: Mapping[str, int], device: torch.device
) -> None:
    heads, inner = cases
    for dtype in (torch.bfloat16, torch.float32):
        h = exact(9, heads.width, seed=20)
        index = torch.tensor([8, 0, 3], dtype=torch.int32)
        results = []
        for place, run in (
            (Place(dtype, device), project_append_feed),
            (Place(dtype, CPU), fused.project_append_feed),
            (Place(TRUTH, CPU), fused.project_append_feed),
        ):
            # Norms of other weights: each half of the launch must find its own.
            projection, part = heads.build(3, place), inner.build(place, seed=7)
            given: Any = {"config": config} if run is project_append_feed else {}
            x = h.to(place.device, place.dtype)
            found = run(x, projection, part, index=index.to(place.device), **given)
            results.append((projection.pages, *(each.cpu() for each in found)))
        pages, queries, out = zip(*results, strict=True)
        if queries[0].numel():
            assert_within_budget("queries", *queries)
        assert_within_budget("feed", *out)
        if heads.has_pages:
            assert_same_entries(*pages)


HALVES: dict[str, tuple[Sequence[int] | None, Sequence[int] | None]] = {
    "both": ((1, 0, 1, 0, 0), (0, 0, 1, 1, 0)),
    "few attend": ((0, 0, 0, 1, 0), None),
    "nobody attends": ((0, 0, 0, 0, 0), (1, 0, 0, 1, 0)),
    "nobody feeds": ((1, 0, 0, 1, 0), (0, 0, 0, 0, 0)),
    "few feed": (None, (0, 1, 0, 0, 0)),
}


@pytest.mark.parametrize("config", [GUARDED["stream"], GUARDED["tensor"]], ids=["stream", "tensor"])
@pytest.mark.parametrize("flags", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("leaves_all", [True, False])
def test_parallel_of_chosen_rows(
    leaves_all: bool,
    flags: tuple[Sequence[int] | None, Sequence[int] | None],
    config: Mapping[str, int],
    device: torch.device,
) -> None:
    heads = replace(HEADS, leaves_all=leaves_all)
    for dtype in DTYPES:
        if dtype == torch.float32 and config["BLOCK_N"] > 4:
            continue  # streamed in any case
        results = []
        for place, run in (
            (Place(dtype, device), project_append_feed),
            (Place(dtype, CPU), fused.project_append_feed),
            (Place(TRUTH, CPU), fused.project_append_feed),
        ):
            own, part = heads.build(5, place), GATED.build(place, seed=7)
            given: Any = {"config": config} if run is project_append_feed else {}
            chosen = place.chosen(flags[0]), place.chosen(flags[1])
            found = run(place.numbers(5, 96, seed=20), own, part, chosen=chosen, **given)
            results.append((own.pages, *(each.cpu() for each in found)))
        pages, *outputs = zip(*results, strict=True)
        for name, each, runs in zip(("queries", "feed"), outputs, flags, strict=True):
            rows = torch.ones(5, dtype=torch.bool) if runs is None else torch.tensor(runs).bool()
            if rows.any():
                assert_within_budget(name, *(out[rows] for out in each))
            assert each[0][~rows].isnan().all()
        if leaves_all or flags[0] is None or any(flags[0]):
            assert_same_entries(*pages)
        else:
            assert memory(pages[0]).isnan().all()


@pytest.mark.parametrize("config", GUARDED.values(), ids=GUARDED)
def test_parallel_of_all_rows_or_none(config: Mapping[str, int], device: torch.device) -> None:
    """All: the bits of a launch without flags. None: weights of no half that is idle are read."""
    place = Place(torch.bfloat16, device)
    h, part = place.numbers(5, 96, seed=20), GATED.build(place, seed=7)
    plain, guarded = HEADS.build(5, place), HEADS.build(5, place)
    right = project_append_feed(h, plain, part, config=config)
    everybody, nobody = place.chosen(ALL), place.chosen(NONE)
    found = project_append_feed(h, guarded, part, chosen=(everybody, everybody), config=config)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert plain.pages is not None and guarded.pages is not None
    first, second = memory(plain.pages), memory(guarded.pages)
    assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    own = replace(HEADS, leaves_all=False).build(5, place)
    for flags, is_read in (
        ((nobody, nobody), (False, False)),
        ((nobody, None), (False, True)),
        ((None, nobody), (True, False)),
    ):
        with watched(own.linear.weight, part.linear.weight) as reads:
            project_append_feed(h, own, part, chosen=flags, config=config)
        assert [count > 0 for count in reads] == [each and INTERPRETED.value for each in is_read]


@pytest.mark.parametrize("rows", [1, 5])
def test_parallel_table(rows: int, device: torch.device) -> None:
    place = Place(torch.float32, device)
    h = place.numbers(rows, 96, seed=2)
    ours, theirs = HEADS.build(rows, place), HEADS.build(rows, place)
    actual = project_append_feed(h, ours, GATED.build(place))
    expected = fused.project_append_feed(h, theirs, GATED.build(place))
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 33, 64, 100])
def test_candidates(rows: int) -> None:
    own = candidates(rows, (22016, 4096))
    assert 8 <= len(own) <= 72
    assert [each for each in own if "LONG" not in each] == parallel.candidates(rows, (1, 1))
