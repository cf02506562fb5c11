"""Every compiled operation against its torch form, whoever computes the products."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels import choice, tuning
from fastskip.kernels.choice import FEW_ROWS, LIBRARY, ROW_GEMM
from fastskip.kernels.launch import recording
from fastskip.ops import allocate, compiled, fused
from fastskip.ops.contracts import Activation, Linear, Norm, Pages, Term
from fastskip.ops.operations import FusedOperations
from fastskip.ops.routes import Chosen, Move, Route, Score, Trace, Verdict
from tests.budget import assert_within_budget
from tests.kernels.sublayers import (
    TRUTH,
    FeedCase,
    Place,
    ProjectionCase,
    assert_same_entries,
    memory,
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
@pytest.mark.parametrize("is_normed", (False, True))
def test_project_append(
    by: str,
    is_normed: bool,
    blocks: int,
    is_indexed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = ProjectionCase(
        4, 2, 16, WIDTH, has_bias=blocks == 1, is_centred=blocks == 2, has_head_norms=is_normed
    )
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
@pytest.mark.parametrize("is_normed", (False, True))
def test_project_append_feed(
    by: str, is_normed: bool, is_shared: bool, dtype: torch.dtype, device: torch.device
) -> None:
    heads = ProjectionCase(4, 2, 16, WIDTH, has_head_norms=is_normed)
    ffn = FeedCase(24, WIDTH)
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


RUNS = {"some": (1, 0, 1, 1, 0), "one": (0, 0, 0, 1, 0), "none": (0,) * 5, "all": (1,) * 5}
OTHERS = (0, 0, 1, 0, 1)
FLAGS = "flags"
"""Chosen rows that are few: kernels of few rows read flags, whatever the tables say."""


@pytest.fixture(params=(FLAGS, LIBRARY, ROW_GEMM))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How chosen rows are computed, and by whom what all rows need."""
    asked: str = request.param
    if asked != FLAGS:
        monkeypatch.setattr(compiled, "FEW_CHOSEN", 0)
    monkeypatch.setattr(compiled, "choose_product", lambda *_, **__: asked)
    with recording() as account, allocate.poisoned():
        yield asked
    names = set(account.by_kernel())
    few = {"project_append", "feed", "project_append_feed", "add_terms"}
    assert names & few if asked == FLAGS else "linear_rows" in names
    assert not names & ({"linear_rows", "library_product"} if asked == FLAGS else few)


def chosen_of(ops: FusedOperations, place: Place, runs: Sequence[int] | None) -> Chosen | None:
    return None if runs is None else ops.choose_rows(place.integers(*runs))


def rows_that(runs: Sequence[int] | None) -> list[int]:
    return [row for row in range(ROWS) if runs is None or runs[row]]


FILLING = 1234.0


def fill(pages: Pages) -> None:
    """Numbers in all slots: what rows that do not run would store there may be NaN."""
    for slab in pages.slabs:
        slab.fill_(FILLING)


def unfill(pages: Pages) -> None:
    """NaN in the slots that nobody wrote."""
    assert not memory(pages).isnan().any()
    for slab in pages.slabs:
        slab[slab == slab.new_tensor(FILLING)] = float("nan")


def check_some(name: str, made: Made, dtype: torch.dtype, device: torch.device) -> None:
    """As ``check``, of results that may have no rows."""
    actual = made(OURS, Place(dtype, device))
    eager, truth = (made(THEIRS, Place(each, torch.device("cpu"))) for each in (dtype, TRUTH))
    for ours, theirs, true in zip(actual, eager, truth, strict=True):
        assert ours.shape == theirs.shape
        if len(ours):
            assert_within_budget(name, ours.cpu(), theirs, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leaves_all", (True, False))
@pytest.mark.parametrize("runs", ("some", "none"))
@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (ProjectionCase(4, 2, 16, WIDTH, has_bias=True), 1),
        (ProjectionCase(4, 2, 16, WIDTH, is_centred=True), 2),
        (ProjectionCase(4, 2, 16, WIDTH, has_pages=False), 1),
        (ProjectionCase(4, 2, 16, WIDTH, has_bias=True, has_head_norms=True), 1),
        (ProjectionCase(4, 2, 16, WIDTH, has_head_norms=True), 2),
    ],
    ids=("one", "pair", "queries", "norms of heads", "pair with norms of heads"),
)
def test_project_append_of_chosen_rows(
    way: str,
    case: ProjectionCase,
    blocks: int,
    runs: str,
    leaves_all: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    made_pages: list[Any] = []

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, _ = rows_of(place, False)
        projections = [
            replace(case.build(ROWS, place, seed=7 * number), leaves_all=leaves_all)
            for number in range(blocks)
        ]
        made_pages.append([each.pages for each in projections if each.pages is not None])
        for pages in made_pages[-1]:
            fill(pages)
        found = ops.project_append(h, projections, chosen=chosen_of(ops, place, RUNS[runs]))
        for pages in made_pages[-1]:
            unfill(pages)
        assert all(each.shape == (ROWS, 4, 16) for each in found)
        return [each[rows_that(RUNS[runs])] for each in found]

    check_some("queries", made, dtype, device)
    for pages in zip(*made_pages, strict=True):
        if leaves_all or runs != "none":
            assert_same_entries(*pages)
        else:
            assert memory(pages[0]).isnan().all()


def test_only_entries_of_chosen_rows(way: str, device: torch.device) -> None:
    """A block whose queries nobody asks for."""
    made_pages: list[Any] = []

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        own = replace(ProjectionCase(0, 2, 16, WIDTH).build(ROWS, place), leaves_all=False)
        made_pages.append(own.pages)
        fill(made_pages[-1])
        chosen = chosen_of(ops, place, RUNS["some"])
        (found,) = ops.project_append(rows_of(place, False)[0], [own], chosen=chosen)
        unfill(made_pages[-1])
        return [found[:0]]

    check_some("queries", made, torch.float32, device)
    assert_same_entries(*made_pages)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "is_pair"), [(Activation.GATED_SILU, False), (Activation.RELU, True)]
)
@pytest.mark.parametrize("runs", RUNS)
def test_feed_of_chosen_rows(
    way: str,
    runs: str,
    activation: Activation,
    is_pair: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = FeedCase(24, WIDTH, activation, has_bias=activation is Activation.RELU)

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, _ = rows_of(place, False)
        parts = [case.build(place, seed=7 * number) for number in range(1 + is_pair)]
        changes = [place.numbers(ROWS, WIDTH, seed=30 + number) for number in range(2)]
        chosen = chosen_of(ops, place, RUNS[runs])
        found = ops.feed(h, parts, changes=changes if is_pair else None, chosen=chosen)
        assert all(each.shape == (ROWS, 24) for each in found)
        return [each[rows_that(RUNS[runs])] for each in found]

    check_some("feed", made, dtype, device)


PAIRS = {
    "attention": (RUNS["some"], None),
    "ffn": (None, RUNS["some"]),
    "both": (RUNS["some"], OTHERS),
    "nothing": (RUNS["none"], RUNS["none"]),
}


@pytest.mark.parametrize("leaves_all", (True, False))
@pytest.mark.parametrize("pair", PAIRS)
def test_project_append_feed_of_chosen_rows(
    way: str, pair: str, leaves_all: bool, device: torch.device
) -> None:
    heads, ffn = ProjectionCase(4, 2, 16, WIDTH), FeedCase(24, WIDTH)
    attends, feeds = PAIRS[pair]
    made_pages: list[Any] = []

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, _ = rows_of(place, False)
        own = replace(heads.build(ROWS, place), leaves_all=leaves_all)
        part = replace(ffn.build(place, seed=7), norm=own.norm)
        made_pages.append(own.pages)
        fill(made_pages[-1])
        chosen = chosen_of(ops, place, attends), chosen_of(ops, place, feeds)
        queries, found = ops.project_append_feed(h, own, part, chosen=chosen)
        unfill(made_pages[-1])
        return [queries[rows_that(attends)], found[rows_that(feeds)]]

    check_some("parallel", made, torch.bfloat16, device)
    if leaves_all or pair != "nothing":
        assert_same_entries(*made_pages)
    else:
        assert memory(made_pages[0]).isnan().all()


TERMS = {
    "one": (RUNS["some"],),
    "of nobody": (RUNS["none"],),
    "of all": (RUNS["all"],),
    "second": (None, RUNS["some"]),
    "first": (RUNS["some"], None),
    "both": (RUNS["some"], OTHERS),
    "neither": (RUNS["none"], RUNS["none"]),
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(
    ("factor", "has_bias", "dtype"), [(1.0, False, torch.float32), (0.5, True, torch.bfloat16)]
)
def test_add_terms_of_chosen_rows(
    way: str, terms: str, factor: float, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    given = TERMS[terms]

    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, _ = rows_of(place, False)
        before = h.clone()
        own = terms_of(place, (24, 40)[: len(given)], has_bias)
        for runs, term in zip(given, own, strict=True):
            idle = [row for row in range(ROWS) if runs is not None and not runs[row]]
            term.x[idle] = float("nan")
        chosen = [chosen_of(ops, place, runs) for runs in given]
        assert ops.add_terms_(h, own, factor=factor, chosen=chosen) is h
        idle = [row for row in range(ROWS) if not any(x is None or x[row] for x in given)]
        assert torch.equal(h[idle], before[idle])
        return [h]

    check("h", made, dtype, device)


@pytest.mark.parametrize("is_chosen", (False, True))
def test_decisions_follow_an_update(way: str, is_chosen: bool, device: torch.device) -> None:
    def made(ops: FusedOperations, place: Place) -> list[Tensor]:
        h, _ = rows_of(place, False)
        runs = RUNS["some"] if is_chosen or way == FLAGS else RUNS["all"]
        verdicts = [
            Verdict(
                score=score,
                bar=bar,
                runs=place.integers(*(7,) * ROWS),
                candidates=place.integers(1, 1, 0, 1, 1),
                weight=place.numbers(WIDTH, seed=5).float(),
            )
            for score, bar in ((Score.COSINE, 0.8), (Score.LINEAR, 0.3))
        ]
        trace = Trace(h.clone(), torch.zeros(ROWS, 2, dtype=h.dtype, device=h.device))
        numbers = place.integers(*range(ROWS))
        ran = [place.integers(*runs)]
        then = Route(verdicts, numbers, numbers, trace, Move.NEXT, ran, place.integers(0))
        ops.add_terms_(
            h, terms_of(place, (24,), False), chosen=[chosen_of(ops, place, runs)], then=then
        )
        flags = torch.stack([each.runs for each in verdicts]).to(h.dtype)
        assert 0 < flags[:, [0, 1, 3, 4]].sum() < 8, "no bar between the scores"
        return [h, trace.found, trace.snapshot, flags]

    check("then", made, torch.float32, device)


@pytest.mark.parametrize(
    ("rows", "capacity", "names"),
    [
        (1, None, ["add_terms"]),
        (64, None, ["add_terms"]),
        (64, 0.5, ["add_terms", "route", "decide"]),
        (640, None, ["library_product", "route"]),
    ],
)
def test_decisions_of_few_rows_need_no_launch(
    rows: int, capacity: float | None, names: list[str]
) -> None:
    numbers = blank(rows, dtype=torch.int32)
    verdict = Verdict(
        score=Score.LINEAR,
        bar=0.0,
        weight=blank(4096, dtype=torch.float32),
        capacity=capacity,
        runs=numbers,
        candidates=numbers,
    )
    then = Route([verdict], numbers, numbers, None, Move.NONE, [], blank(1, dtype=torch.int32))
    terms = [Term(blank(rows, 11008), Linear(blank(4096, 11008)))]
    with tuning.table("default"):
        assert launched(OURS.add_terms_, blank(rows, 4096), terms, then=then) == names


@pytest.mark.parametrize("rows", (0, 1, 64, 65))
def test_many_rows_are_chosen_by_an_index_too(rows: int, device: torch.device) -> None:
    runs = (torch.arange(rows, device=device) % 3 == 1).to(torch.int32)
    found = OURS.choose_rows(runs)
    assert found.runs is runs
    if rows <= compiled.FEW_CHOSEN:
        assert found.index is None and found.count is None
    else:
        assert found.index is not None and found.count is not None
        assert found.count.tolist() == [int(runs.sum())]
        assert found.index[: int(runs.sum())].tolist() == runs.nonzero().flatten().tolist()


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
