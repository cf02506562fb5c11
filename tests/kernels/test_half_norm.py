"""Norms of which the update before takes half: what reads them sees the norm of what was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels import feed, head, projection, residual
from fastskip.kernels.launch import recording
from fastskip.kernels.numerics import INTERPRETED
from fastskip.ops import allocate, compiled, fused
from fastskip.ops.contracts import ARRIVALS, Activation, HalfNorm, Linear, Norm, Term
from tests.budget import assert_within_budget
from tests.kernels.paging import exact
from tests.kernels.reads import watched
from tests.kernels.sublayers import (
    APART,
    STREAM,
    STREAM_2,
    STREAM_4,
    TENSOR,
    TRUTH,
    FeedCase,
    Place,
    ProjectionCase,
    assert_same_entries,
)

CPU = torch.device("cpu")
WIDTH = 160
"""Of few blocks a multiple; two and five programs can share what is summed over."""
UPDATES = {
    "stream": {**STREAM, "BLOCK_M": 16},
    "stream 2": {**STREAM_2, "BLOCK_M": 64},
    "stream 4": {**STREAM_4, "BLOCK_M": 8},
    "tensor": TENSOR,
    "shared": {**TENSOR, "SPLITS": 2},
}
# (dtype, configuration): no such half in fp16; fp32 is streamed in any case.
FORMS = [
    pytest.param(dtype, config, id=f"{name}-{dtype}")
    for name, config in UPDATES.items()
    for dtype in (torch.bfloat16, torch.float32)
    if dtype != torch.float32 or config["BLOCK_N"] <= 4
]
READERS = {
    "stream": STREAM,
    "stream 4": STREAM_4,
    "tensor": TENSOR,
    "norm apart": APART,
    # So many squares that they are read behind the product.
    "wide": {**TENSOR, "BLOCK_N": 64},
    "shared by two": {**TENSOR, "SPLITS": 2},
    "shared by five": {**TENSOR, "BLOCK_E": 32, "SPLITS": 5},
}
READER_FORMS = [
    pytest.param(dtype, config, id=f"{name}-{dtype}")
    for name, config in READERS.items()
    for dtype in (torch.bfloat16, torch.float32)
    if dtype != torch.float32 or config["BLOCK_N"] <= 4
]


def terms_of(rows: int, place: Place, sizes: Sequence[int] = (96,)) -> list[Term]:
    return [
        Term(
            place.numbers(rows, size, seed=size),
            place.linear(WIDTH, size, seed=size + 1, has_bias=True),
        )
        for size in sizes
    ]


def left(rows: int, place: Place, norm: Norm) -> tuple[Tensor, HalfNorm]:
    """An ``h`` and the half of its norm, by a kernel of 20 tiles."""
    h = place.numbers(rows, WIDTH, seed=20)
    config = UPDATES["stream 4"]
    with allocate.poisoned():
        half = residual.add_terms_and_halve_(h, terms_of(rows, place), norm, config=config)
    return h, half


@pytest.mark.parametrize("sizes", [(96,), (128, 96)], ids=["a term", "two"])
@pytest.mark.parametrize("rows", (1, 6, 19))
@pytest.mark.parametrize(("dtype", "config"), FORMS)
def test_what_an_update_leaves(
    dtype: torch.dtype,
    config: Mapping[str, int],
    rows: int,
    sizes: Sequence[int],
    device: torch.device,
) -> None:
    """The same ``h`` to the bit as without, and the half of its norm."""
    place = Place(dtype, device)
    norm, terms = place.norm(WIDTH, seed=1), terms_of(rows, place, sizes)
    h = place.numbers(rows, WIDTH, seed=20)
    alone, arrivals = h.clone(), torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
    factor = 1.0 if rows == 1 else 0.22
    more: dict[str, Any] = {"factor": factor, "arrivals": arrivals, "config": config}
    with allocate.poisoned(), recording() as account:
        half = residual.add_terms_and_halve_(h, terms, norm, **more)
    residual.add_terms_(alone, terms, **more)
    assert len(account.launches) == 1
    assert torch.equal(h, alone) and half.norm is norm and not arrivals.any()
    right = fused.halve(h.cpu(), replace(norm, weight=norm.weight.cpu()))
    assert torch.equal(half.rows.cpu(), right.rows)  # one product, rounded once
    assert half.squares.shape == (rows, -(-WIDTH // config["BLOCK_M"]))
    squares = h.cpu().double().square().mean(1, keepdim=True)
    assert_within_budget("squares", half.squares.sum(1, keepdim=True).cpu(), right.squares, squares)


@contextmanager
def shared(config: Mapping[str, int], device: torch.device) -> Iterator[Tensor]:
    """Zeros to count arrivals by, which are left zero; as many programs as ``SPLITS`` share each
    tile of what is launched, and all parts are written."""
    arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
    with recording() as account:
        yield arrivals
    (launch,), parts = account.launches, config.get("SPLITS", 1)
    assert launch.arguments["SPLITS"] == parts and not arrivals.any()
    if parts > 1:
        assert launch.grid[2] == parts and launch.arguments["shared"].parts.isfinite().all()


def check_read(
    read: Callable[[Place, Tensor, HalfNorm | None], Tensor],
    norm_of: Callable[[Place], Norm],
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
) -> None:
    """``read``: from rows and maybe a half to numbers, by a kernel if there is a half; against the
    norm of the rows that an update left, whole."""
    place = Place(dtype, device)
    h, half = left(rows, place, norm_of(place))
    with allocate.poisoned():
        actual = read(place, torch.full_like(h, float("nan")), half)
    found = []
    for other in (Place(dtype, CPU), Place(TRUTH, CPU)):
        whole = other.numbers(rows, WIDTH, seed=20)
        fused.add_terms_(whole, terms_of(rows, other))
        found.append(read(other, whole, None))
    assert_within_budget("read", actual.cpu(), *found)


@pytest.mark.parametrize(
    "case",
    [FeedCase(40, WIDTH), FeedCase(72, WIDTH, Activation.RELU, has_bias=True)],
    ids=["gated", "ReLU, biases"],
)
@pytest.mark.parametrize(("dtype", "config"), READER_FORMS)
def test_feed(
    dtype: torch.dtype, config: Mapping[str, int], case: FeedCase, device: torch.device
) -> None:
    def read(place: Place, h: Tensor, half: HalfNorm | None) -> Tensor:
        part = case.build(place)
        if half is None:
            return fused.feed(h, [part])[0]
        with watched(part.norm.weight) as reads, shared(config, device) as arrivals:
            found = feed.feed(h, [part], half=half, arrivals=arrivals, config=config)[0]
        assert reads == [0]
        return found

    check_read(read, lambda place: case.build(place).norm, dtype, 5, device)


@pytest.mark.parametrize("rows", (5, 6))
@pytest.mark.parametrize(("dtype", "config"), READER_FORMS)
def test_projection(
    dtype: torch.dtype, config: Mapping[str, int], rows: int, device: torch.device
) -> None:
    case, pages = ProjectionCase(4, 2, 16, WIDTH, has_bias=True), []

    def read(place: Place, h: Tensor, half: HalfNorm | None) -> Tensor:
        own = case.build(rows, place)
        pages.append(own.pages)
        if half is None:
            return fused.project_append(h, [own])[0]
        with shared(config, device) as arrivals:
            return projection.project_append(h, [own], half=half, arrivals=arrivals, config=config)[
                0
            ]

    check_read(read, lambda place: case.build(rows, place).norm, dtype, rows, device)
    assert_same_entries(*pages)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("config", [STREAM, STREAM_4, TENSOR, APART], ids=str)
def test_head(config: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
    def norm_of(place: Place) -> Norm:
        return place.norm(WIDTH, seed=3)

    def read(place: Place, h: Tensor, half: HalfNorm | None) -> Tensor:
        linear = place.linear(100, WIDTH, seed=5)
        if half is None:
            return fused.head_logits(h, norm_of(place), linear)
        with recording() as account:
            found = head.head_logits(h, norm_of(place), linear, half=half, config=config)
        assert len(account.launches) == 1  # whatever the configuration says of norms
        return found

    check_read(read, norm_of, dtype, 5, device)


def test_few_programs_of_many_tiles(device: torch.device) -> None:
    """Each tile divides by the same root."""
    config, case = {**STREAM, "BLOCK_M": 8, "LONG": 3}, FeedCase(40, WIDTH)

    def read(place: Place, h: Tensor, half: HalfNorm | None) -> Tensor:
        part = case.build(place)
        if half is None:
            return fused.feed(h, [part])[0]
        return feed.feed(h, [part], half=half, config=config)[0]

    check_read(read, lambda place: case.build(place).norm, torch.bfloat16, 1, device)


@pytest.mark.parametrize("config", [STREAM_4, TENSOR], ids=["stream", "tensor"])
@pytest.mark.parametrize("scale", (1e-6, 1.0, 3e4))
def test_rows_of_every_size(scale: float, config: Mapping[str, int], device: torch.device) -> None:
    """Small ones meet the norm's epsilon, large ones stay in range."""
    place, true = Place(torch.bfloat16, device), Place(TRUTH, CPU)
    case, rows = FeedCase(40, WIDTH), exact(3, WIDTH, seed=4, scale=scale)
    part, nothing = case.build(place), Linear(torch.zeros(WIDTH, 16).bfloat16().to(device))
    h, none = rows.bfloat16().to(device), Term(place.numbers(3, 16, seed=1), nothing)
    half = residual.add_terms_and_halve_(h, [none], part.norm, config=UPDATES["stream 4"])
    actual = feed.feed(h, [part], half=half, config=config)[0]
    eager = fused.feed(rows.bfloat16(), [case.build(Place(torch.bfloat16, CPU))])[0]
    truth = fused.feed(rows.bfloat16().double(), [case.build(true)])[0]
    assert_within_budget("rows", actual.cpu(), eager, truth)


def test_no_rows(device: torch.device) -> None:
    place = Place(torch.bfloat16, device)
    part = FeedCase(40, WIDTH).build(place)
    h, half = left(0, place, part.norm)
    assert len(h) == len(half.rows) == len(half.squares) == 0
    assert feed.feed(h, [part], half=half)[0].shape == (0, 40)


def test_halves_are_of_all_rows_of_one_norm(device: torch.device) -> None:
    place = Place(torch.float32, device)
    part = FeedCase(40, WIDTH).build(place)
    h, half = left(3, place, part.norm)
    given: list[dict[str, Any]] = [
        {"feeds": [part, part]},
        {"feeds": [part], "index": place.integers(0, 2)},
        {"feeds": [part], "changes": [h]},
    ]
    for each in given:
        with pytest.raises(ValueError, match="half: allowed only with one norm, over all rows"):
            feed.feed(h, half=half, config=STREAM, **each)


@pytest.mark.skipif(not INTERPRETED.value, reason="fp32 on a CPU")
@pytest.mark.parametrize("ops", (fused, compiled), ids=["torch", "kernels"])
@pytest.mark.parametrize("name", ("RMS", "LayerNorm", "a bias", "fp16"))
def test_norms_that_have_no_half(ops: Any, name: str) -> None:
    """The update is done all the same."""
    place = Place(torch.float16 if name == "fp16" else torch.float32, CPU)
    norm = place.norm(WIDTH, seed=1, is_centred=name == "LayerNorm")
    if name == "a bias":
        norm = replace(norm, bias=place.numbers(WIDTH, seed=2))
    h, expected = place.numbers(2, WIDTH, seed=3), place.numbers(2, WIDTH, seed=3)
    half = ops.add_terms_and_halve_(h, terms_of(2, place), norm)
    ops.add_terms_(expected, terms_of(2, place))
    assert torch.equal(h, expected) and (half is not None) == (name == "RMS")


@pytest.mark.skipif(not INTERPRETED.value, reason="fp32 on a CPU")
def test_products_of_many_rows_take_norms_whole() -> None:
    """Where the norm has a launch of its own anyway: none is left, and none is read."""
    place, rows = Place(torch.float32, CPU), 200
    part = FeedCase(40, WIDTH).build(place)
    h = place.numbers(rows, WIDTH, seed=3)
    assert compiled.add_terms_and_halve_(h, terms_of(rows, place), part.norm) is None
    whole = compiled.feed(h, [part])[0]
    wrong = HalfNorm(part.norm, torch.full_like(h, float("nan")), h[:, :1])
    assert torch.equal(compiled.feed(h, [part], half=wrong)[0], whole)
