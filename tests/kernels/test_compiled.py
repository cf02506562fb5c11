"""Every compiled operation against its torch form, whoever computes the products."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels import choice, tuning
from fastskip.kernels.choice import FEW_ROWS, LIBRARY, ROW_GEMM
from fastskip.kernels.launch import recording
from fastskip.ops import compiled, fused
from fastskip.ops.contracts import Activation, Linear, Norm, Term
from fastskip.ops.operations import FusedOperations
from tests.budget import assert_within_budget
from tests.kernels.sublayers import (
    TRUTH,
    FeedCase,
    Place,
    ProjectionCase,
    assert_same_entries,
)
from tests.kernels.test_sampler import assert_same, build_choice

DTYPES = (torch.float32, torch.bfloat16)  # fp16 has tests of its own where it differs
WIDTH, ROWS, TOTAL = 32, 5, 9
INDEX = (7, 0, 8, 3, 2)
OURS: FusedOperations = compiled
THEIRS: FusedOperations = fused
Made = Callable[[FusedOperations, Place], list[Tensor]]


@pytest.fixture(params=(FEW_ROWS, LIBRARY, ROW_GEMM))
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who computes, whatever the tables say; afterwards, that nobody else did."""
    chosen: str = request.param
    monkeypatch.setattr(compiled, "choose_product", lambda *_, **__: chosen)
    with recording() as account:
        yield chosen
    names = set(account.by_kernel())
    few = {"project_append", "feed", "project_append_feed", "add_terms", "apply_terms", "head"}
    others = {LIBRARY: {"library_product"}, ROW_GEMM: {"linear_rows"}, FEW_ROWS: few}
    assert names & others.pop(chosen)
    assert not names & set().union(*others.values())


def check(name: str, made: Made, dtype: torch.dtype, device: torch.device) -> None:
    actual = made(OURS, Place(dtype, device))
    eager, truth = (made(THEIRS, Place(each, torch.device("cpu"))) for each in (dtype, TRUTH))
    assert len(actual) == len(eager)
    for ours, theirs, true in zip(actual, eager, truth, strict=True):
        assert_within_budget(name, ours.cpu(), theirs, true)


def rows_of(place: Place, is_indexed: bool) -> tuple[Tensor, Tensor | None]:
    index = place.integers(*INDEX) if is_indexed else None
    return place.numbers(TOTAL if is_indexed else ROWS, WIDTH, seed=20), index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", (1, 2))
@pytest.mark.parametrize("is_indexed", (False, True))
def test_project_append(
    by: str, blocks: int, is_indexed: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = ProjectionCase(4, 2, 16, WIDTH, has_bias=blocks == 1, is_centred=blocks == 2)
    made_pages: list[Any] = []

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, index = rows_of(place, is_indexed)
        projections = [case.build(ROWS, place, seed=7 * number) for number in range(blocks)]
        made_pages.append([each.pages for each in projections])
        return ops.project_append(h, projections, index=index)

    check("queries", made, dtype, device)
    for pages in zip(*made_pages, strict=True):
        assert_same_entries(*pages)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("is_pair", (False, True))
def test_feed(
    by: str, activation: Activation, is_pair: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = FeedCase(24, WIDTH, activation, has_bias=activation is Activation.RELU)

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, index = rows_of(place, is_indexed=not is_pair)
        parts = [case.build(place, seed=7 * number) for number in range(1 + is_pair)]
        changes = [place.numbers(ROWS, WIDTH, seed=30 + number) for number in range(2)]
        return ops.feed(h, parts, index=index, changes=changes if is_pair else None)

    check("feed", made, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_shared", (False, True))
def test_project_append_feed(
    by: str, is_shared: bool, dtype: torch.dtype, device: torch.device
) -> None:
    heads, ffn = ProjectionCase(4, 2, 16, WIDTH), FeedCase(24, WIDTH)
    made_pages: list[Any] = []

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, index = rows_of(place, is_indexed=is_shared)
        own, part = heads.build(ROWS, place), ffn.build(place, seed=7)
        if is_shared:
            part = type(part)(own.norm, part.linear, part.activation)
        made_pages.append(own.pages)
        return list(ops.project_append_feed(h, own, part, index=index))

    check("parallel", made, dtype, device)
    assert_same_entries(*made_pages)


def terms_of(place: Place, sizes: Sequence[int], has_bias: bool) -> list[Term]:
    return [
        Term(
            place.numbers(ROWS, size, seed=size),
            place.linear(WIDTH, size, seed=size + 1, has_bias=has_bias),
        )
        for size in sizes
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_indexed", (False, True))
@pytest.mark.parametrize(
    ("sizes", "changes", "factor", "has_bias"),
    [((24,), 0, 1.0, False), ((24, 40), 0, 1.0, True), ((24, 24), 2, 0.5, True)],
    ids=("one", "both sublayers", "pair"),
)
def test_add_terms(
    by: str,
    sizes: Sequence[int],
    changes: int,
    factor: float,
    has_bias: bool,
    is_indexed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, index = rows_of(place, is_indexed)
        added = [place.numbers(ROWS, WIDTH, seed=30 + number) for number in range(changes)]
        terms = terms_of(place, sizes, has_bias)
        before = h.clone()
        assert ops.add_terms_(h, terms, index=index, changes=added, factor=factor) is h
        untouched = [row for row in range(len(h)) if row not in INDEX] if is_indexed else []
        assert torch.equal(h[untouched], before[untouched])
        return [h]

    check("h", made, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_terms(by: str, dtype: torch.dtype, device: torch.device) -> None:
    check("terms", lambda ops, p: ops.apply_terms(terms_of(p, (24, 24), True)), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", (False, True))
def test_head_logits(by: str, has_norm: bool, dtype: torch.dtype, device: torch.device) -> None:
    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, _ = rows_of(place, False)
        norm = place.norm(WIDTH, seed=1) if has_norm else None
        return [ops.head_logits(h, norm, place.linear(50, WIDTH, seed=2))]

    check("logits", made, dtype, device)


def test_head_choose(by: str, device: torch.device) -> None:
    ours, theirs = (build_choice(ROWS, device=device) for _ in range(2))
    place = Place(torch.float32, device)
    (h, _), norm = rows_of(place, False), place.norm(WIDTH, seed=1)
    head = place.linear(50, WIDTH, seed=2)
    OURS.head_choose(h, norm, head, ours)
    THEIRS.head_choose(h, norm, head, theirs)
    assert_same(ours, theirs)


def test_no_rows(by: str, device: torch.device) -> None:
    place = Place(torch.float32, device)
    h, index = rows_of(place, False)[0], place.integers()
    case, ffn = ProjectionCase(4, 2, 16, WIDTH).build(0, place), FeedCase(24, WIDTH).build(place)
    assert OURS.project_append(h, [case], index=index)[0].shape == (0, 4, 16)
    assert OURS.feed(h, [ffn], index=index)[0].shape == (0, 24)
    term = Term(place.numbers(0, 24, seed=1), place.linear(WIDTH, 24, seed=2))
    before = h.clone()
    assert torch.equal(OURS.add_terms_(h, [term], index=index), before)
    full = place.numbers(1, 24, seed=1)  # something for the fixture to see
    OURS.apply_terms([Term(full, term.linear)])


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(call: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    with recording(is_dry=True) as account:
        call(*arguments, **options)
    return [launch.name for launch in account.launches]


@pytest.mark.parametrize("slug", tuning.slugs())
def test_the_table_decides_by_rows(slug: str) -> None:
    norm, linear = Norm(blank(4096), 1e-5), Linear(blank(32064, 4096))
    down = Linear(blank(4096, 11008))
    with tuning.table(slug):
        assert launched(OURS.head_logits, blank(1, 4096), norm, linear) == ["head"]
        names = launched(OURS.head_logits, blank(10240, 4096), norm, linear)
        assert names in (["normalize", "library_product"], ["normalize", "linear_rows"])
        one, many = ([Term(blank(n, 11008), down)] for n in (1, 10240))
        assert launched(OURS.add_terms_, blank(1, 4096), one) == ["add_terms"]
        assert len(launched(OURS.add_terms_, blank(10240, 4096), many)) == 1, "residual included"


@pytest.mark.parametrize("slug", tuning.slugs())
@pytest.mark.parametrize("name", choice.TABLES)
def test_tables_name_only_what_there_is(slug: str, name: str) -> None:
    for entry in tuning.read_table(slug).entries.get(name, ()):
        assert entry.config["by"] in (FEW_ROWS, LIBRARY, ROW_GEMM)


def test_every_operation_of_the_protocol_is_there() -> None:
    wanted = {name for name in vars(FusedOperations) if not name.startswith("_")}
    assert not [name for name in sorted(wanted) if not callable(getattr(compiled, name, None))]
