"""Second halves of sublayers: products added to the residual stream in place."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fastskip.kernels import residual
from fastskip.kernels.launch import recording
from fastskip.kernels.numerics import INTERPRETED
from fastskip.ops import allocate, fused
from fastskip.ops.contracts import Linear, Term
from fastskip.ops.routes import Chosen
from tests.budget import assert_within_budget
from tests.kernels.paging import exact
from tests.kernels.reads import watched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTH = 40
CPU = torch.device("cpu")


def build_terms(rows: int, sizes: Sequence[int], biases: Sequence[bool]) -> list[Term]:
    return [
        Term(
            exact(rows, size, seed=size),
            Linear(
                exact(WIDTH, size, seed=size + 1, scale=size**-0.5),
                exact(WIDTH, seed=size + 2) if has_bias else None,
            ),
        )
        for size, has_bias in zip(sizes, biases, strict=True)
    ]


def cast(terms: Sequence[Term], device: torch.device, dtype: torch.dtype) -> list[Term]:
    """The terms in a dtype; each input is part of something wider, as a slice of a product is."""
    found = []
    for term in terms:
        rows, size = term.x.shape
        wide = torch.full((rows, size + 8), float("nan"), dtype=dtype, device=device)
        wide[:, :size] = term.x
        weight, bias = term.linear.weight, term.linear.bias
        found.append(
            Term(
                wide[:, :size],
                Linear(weight.to(device, dtype), None if bias is None else bias.to(device, dtype)),
            )
        )
    return found


def dense(terms: Sequence[Term]) -> list[Term]:
    """The same for torch, whose bf16 products on a CPU read what lies between the rows."""
    return [Term(term.x.contiguous(), term.linear) for term in terms]


def check_add(
    dtype: torch.dtype,
    device: torch.device,
    terms: Sequence[Term],
    *,
    index: Sequence[int] | None = None,
    changes: int = 0,
    factor: float = 1.0,
    config: Mapping[str, int] | None = None,
) -> None:
    rows = len(terms[0].x)
    total = rows + 3
    whole = exact(total, WIDTH + 8, seed=5)
    added = [exact(rows, WIDTH, seed=50 + number) for number in range(changes)]
    places = None if index is None else torch.tensor(index, dtype=torch.int32)

    def results(
        function: object, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        memory = whole.clone().to(device, dtype)
        h = memory[:, :WIDTH] if index is not None else memory[:rows, :WIDTH]
        assert callable(function)
        given = cast(terms, torch.device(device), dtype)
        extra = {"config": config}
        if function is fused.add_terms_:
            given, extra = dense(given), {}
        returned = function(
            h,
            given,
            index=None if places is None else places.to(device),
            changes=[change.to(device, dtype) for change in added],
            factor=factor,
            **extra,
        )
        assert returned is h
        return memory, memory[list(index) if index is not None else slice(rows), :WIDTH]

    memory, actual = results(residual.add_terms_, dtype, device)
    _, eager = results(fused.add_terms_, dtype, device)
    _, truth = results(fused.add_terms_, torch.float64, "cpu")
    if rows:
        assert_within_budget("rows", actual=actual, eager=eager, truth=truth)
    touched = torch.zeros(memory.shape, dtype=torch.bool)
    touched[list(index) if index is not None else slice(rows), :WIDTH] = True
    assert torch.equal(memory.cpu()[~touched], whole.to(dtype)[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_one_term(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    check_add(dtype, device, build_terms(rows, [70], [True]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_two_terms_of_different_sizes(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    check_add(dtype, device, build_terms(rows, [64, 90], [False, False]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_everything_at_once(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    order = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(rows))[:rows]
    terms = build_terms(rows, [33, 130], [True, True])
    check_add(dtype, device, terms, index=order.tolist(), changes=2, factor=0.5)


SMALL = (
    {"BLOCK_M": 16, "BLOCK_N": 2, "BLOCK_E": 32, "STAGES": 2, "num_warps": 4},
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_E": 32, "STAGES": 2, "num_warps": 4},
)


@pytest.mark.parametrize(
    ("dtype", "config"),
    # fp32 is streamed in any case.
    [(d, c) for d in DTYPES for c in SMALL if d != torch.float32 or c["BLOCK_N"] <= 4],
)
def test_many_blocks(dtype: torch.dtype, config: Mapping[str, int], device: torch.device) -> None:
    """More than one block of weights, of rows and of summands, none of them full."""
    rows = config["BLOCK_N"] + 1
    terms = build_terms(rows, [64, 90], [True, False])
    check_add(dtype, device, terms, changes=2, config=config)
    ours = cast([terms[1], terms[1]], device, dtype)
    for mine in residual.apply_terms(ours, config=config):
        eager, truth = fused.apply_terms(dense(ours))[0], fused.apply_terms(terms)[1]
        assert_within_budget("applied", actual=mine, eager=eager, truth=truth)


@pytest.mark.parametrize("rows", [2, 9])
def test_bias_of_one_term_and_one_change(rows: int, device: torch.device) -> None:
    for biases in ([True, False], [False, True]):
        terms = build_terms(rows, [48, 24], biases)
        check_add(torch.float16, device, terms, changes=1, factor=2.0)


def test_zero_rows_launch_nothing(device: torch.device) -> None:
    terms = build_terms(0, [16, 24], [True, False])
    with recording() as account:
        check_add(torch.float32, device, terms)
        check_add(torch.float32, device, terms, index=[])
        applied = residual.apply_terms(cast(terms, device, torch.float32))
    assert [tuple(each.shape) for each in applied] == [(0, WIDTH), (0, WIDTH)]
    assert account.launches == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize(
    ("sizes", "biases", "launches"),
    [([70], [True], 1), ([50, 50], [False, False], 1), ([50, 50], [True, True], 1),
     ([34, 80], [False, True], 2)],
)  # fmt: skip
def test_apply_terms(
    rows: int,
    sizes: list[int],
    biases: list[bool],
    launches: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    terms = build_terms(rows, sizes, biases)
    if sizes[0] == sizes[-1] and len(terms) == 2:
        # The second of a pair differs in everything but its layout.
        other, bias = terms[1].linear.weight.flip(0), terms[1].linear.bias
        terms[1] = Term(-terms[1].x, Linear(other, None if bias is None else bias.flip(0)))
    ours = cast(terms, device, dtype)
    with allocate.poisoned(), recording() as account:
        actual = residual.apply_terms(ours)
    assert len(account.launches) == launches
    for number, (mine, eager, truth) in enumerate(
        zip(actual, fused.apply_terms(dense(ours)), fused.apply_terms(terms), strict=True)
    ):
        assert_within_budget(f"term {number}", actual=mine, eager=eager, truth=truth)


@pytest.mark.parametrize("rows", [1, 16, 200])
def test_one_launch_and_no_data(rows: int) -> None:
    meta = torch.device("meta")
    terms = cast(build_terms(rows, [64, 128], [True, False]), meta, torch.bfloat16)
    h = torch.empty(rows, WIDTH, dtype=torch.bfloat16, device=meta)
    with recording(is_dry=True) as account:
        residual.add_terms_(h, terms, changes=[h])
        residual.apply_terms(terms[:1])
    assert [launch.name for launch in account.launches].count("add_terms") <= 1
    assert len(account.launches) == 2


BOUNDED = {
    # More than one tile for a program, and several blocks of rows.
    "a row": {**SMALL[0], "BLOCK_N": 1, "PROGRAMS": 2},
    "stream": {**SMALL[0], "PROGRAMS": 4},
    "tensor": {**SMALL[1], "PROGRAMS": 2},
}
Flags = Sequence[Sequence[int] | None]
FLAGS: dict[str, tuple[int, Flags]] = {
    "one term": (1, [[1, 0, 1, 0, 0, 1, 0, 1]]),
    "one term, whole blocks idle": (1, [[0, 0, 0, 0, 1, 1, 0, 0]]),
    "two terms": (2, [[1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 0]]),
    "first for all": (2, [None, [0, 0, 1, 0, 0, 0, 0, 0]]),
    "second for all": (2, [[0, 1, 0, 0, 0, 0, 1, 1], None]),
}


def chosen_of(flags: Flags, rows: int, device: torch.device | str = "cpu") -> list[Chosen | None]:
    return [
        None
        if each is None
        else Chosen(torch.tensor(each[:rows], dtype=torch.int32, device=device))
        for each in flags
    ]


def poisoned(terms: Sequence[Term], flags: Flags) -> list[Term]:
    """The terms with NaN in what belongs to nobody: rows that do not run, weights without any."""
    found = []
    for term, each in zip(terms, flags, strict=True):
        x, weight, bias = term.x, term.linear.weight, term.linear.bias
        if each is not None:
            runs = torch.tensor(each[: len(x)]).bool()
            x = torch.where(runs[:, None], x, float("nan"))
            if not runs.any():
                weight = torch.full_like(weight, float("nan"))
                bias = None if bias is None else torch.full_like(bias, float("nan"))
        found.append(Term(x, Linear(weight, bias)))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", BOUNDED.values(), ids=BOUNDED)
@pytest.mark.parametrize(("count", "flags"), FLAGS.values(), ids=FLAGS)
def test_chosen_rows(
    count: int,
    flags: Flags,
    config: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    for rows in (1, 3 if config["BLOCK_N"] == 1 else 8):
        terms = poisoned(build_terms(rows, [64, 90][:count], [True, False][:count]), flags)
        before = exact(rows, WIDTH, seed=5)
        h = before.to(device, dtype)
        given = cast(terms, device, dtype)
        chosen = chosen_of(flags, rows, device)
        residual.add_terms_(h, given, chosen=chosen, factor=0.5, config=config)
        eager = fused.add_terms_(
            before.to(dtype), dense(cast(terms, torch.device("cpu"), dtype)), factor=0.5,
            chosen=chosen_of(flags, rows),
        )  # fmt: skip
        truth = fused.add_terms_(before.clone(), terms, factor=0.5, chosen=chosen_of(flags, rows))
        changed = torch.zeros(rows, dtype=torch.bool)
        for each in flags:
            changed |= torch.tensor([1] * rows if each is None else each[:rows]).bool()
        assert torch.equal(h.cpu()[~changed], before.to(dtype)[~changed])
        if changed.any():
            assert_within_budget("rows", h.cpu()[changed], eager[changed], truth[changed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", BOUNDED.values(), ids=BOUNDED)
@pytest.mark.parametrize("count", [1, 2])
def test_all_rows_or_none(
    count: int, config: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """All: the bits of a launch without flags. None: no weight is read, nor the stream."""
    rows = config["BLOCK_N"] + 1
    terms = build_terms(rows, [64, 90][:count], [True, True][:count])
    before = exact(rows, WIDTH, seed=5).to(device, dtype)
    plain, guarded, idle = before.clone(), before.clone(), before.clone()
    given = cast(terms, device, dtype)
    residual.add_terms_(plain, given, config=config)
    everybody, nobody = [[1] * rows] * count, [[0] * rows] * count
    residual.add_terms_(guarded, given, chosen=chosen_of(everybody, rows, device), config=config)
    assert not torch.equal(plain, before) and torch.equal(guarded, plain)
    given = cast(poisoned(terms, nobody), device, dtype)
    with watched(idle, *(term.linear.weight for term in given)) as reads:
        residual.add_terms_(idle, given, chosen=chosen_of(nobody, rows, device), config=config)
    assert torch.equal(idle, before) and not any(reads)


@pytest.mark.parametrize("config", BOUNDED.values(), ids=BOUNDED)
@pytest.mark.parametrize("idle", [0, 1])
def test_a_term_without_rows_is_not_read(
    idle: int, config: Mapping[str, int], device: torch.device
) -> None:
    rows = config["BLOCK_N"]
    flags: Flags = [[int(number != idle)] * rows for number in range(2)]
    made = build_terms(rows, [64, 90], [True, False])
    guarded = exact(rows, WIDTH, seed=5).to(device, torch.float32)
    # Not by a launch without the term: that is another kernel, whose sums may round otherwise.
    eager, truth = (
        fused.add_terms_(exact(rows, WIDTH, seed=5).to(dtype), [cast(made, CPU, dtype)[1 - idle]])
        for dtype in (torch.float32, torch.float64)
    )
    spoiled = cast(poisoned(made, flags), device, torch.float32)
    with watched(*(term.linear.weight for term in spoiled)) as reads:
        residual.add_terms_(guarded, spoiled, chosen=chosen_of(flags, rows, device), config=config)
    assert_within_budget("h", guarded, eager, truth)
    assert not reads[idle] and (reads[1 - idle] or not INTERPRETED.value)


def test_guarded_launches_are_bounded() -> None:
    """Programs that may leave at once are few, and counted apart."""
    meta = torch.device("meta")
    terms = cast(build_terms(20, [64], [False]), meta, torch.bfloat16)
    h = torch.empty(20, WIDTH, dtype=torch.bfloat16, device=meta)
    chosen = chosen_of([[1] * 20], 20, meta)
    with recording(is_dry=True) as account:
        for most in (1, 2, 5, 100):
            residual.add_terms_(h, terms, chosen=chosen, config={**SMALL[1], "PROGRAMS": most})
        residual.add_terms_(h, terms, config={**SMALL[1], "PROGRAMS": 2})
        residual.add_terms_(h, terms, chosen=[None], config=SMALL[1])
        residual.add_terms_(h, terms, chosen=chosen)
    assert [launch.grid for launch in account.launches[:6]] == [
        (2, 1), (2, 1), (2, 2), (2, 3), (2, 3), (2, 3)
    ]  # fmt: skip
    assert [launch.is_guarded for launch in account.launches] == [True] * 4 + [False] * 2 + [True]
    assert account.guarded_programs == sum(launch.programs for launch in account.launches) - 12


def test_changes_are_for_all_rows() -> None:
    h = torch.zeros(1, WIDTH)
    with pytest.raises(ValueError, match="chosen: given with changes"):
        terms = build_terms(1, [16], [False])
        residual.add_terms_(h, terms, changes=[h], chosen=chosen_of([[1]], 1))


def test_gradients_are_refused(device: torch.device) -> None:
    terms = cast(build_terms(1, [16], [False]), device, torch.float32)
    h = torch.zeros(1, WIDTH, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="h: requires a gradient"):
        residual.add_terms_(h, terms)
