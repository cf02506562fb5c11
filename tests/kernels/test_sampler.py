"""The greedy sampler against its torch form: integers, so exactly equal."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from fastskip.kernels import sampler
from fastskip.kernels.launch import recording
from fastskip.ops import fused
from fastskip.ops.contracts import Choice
from tests.kernels.paging import exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEPS = 4


def build_choice(rows: int, device: torch.device, *, stops: tuple[int, ...] = ()) -> Choice:
    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Choice(
        tokens=torch.full((rows,), -1, dtype=torch.int64, device=device),
        # A view into something wider, whose rest must stay as it is.
        history=torch.full((STEPS, rows + 3), -1, dtype=torch.int64, device=device)[:, :rows],
        step=integers(0),
        unfinished=integers(*[int(row != 1) for row in range(rows)]),
        stops=torch.tensor(stops, dtype=torch.int64, device=device),
        pad=7,
        counts=torch.arange(3 * (rows + 2), dtype=torch.int32, device=device).view(3, -1)[:, :rows],
        # Each row of its own, beside what no row of this batch may read.
        grows=torch.arange(3 * (rows + 1), device=device).view(3, -1).remainder(2).int()[:, :rows],
        positions=torch.arange(rows, dtype=torch.int32, device=device) * 5,
    )


def assert_same(actual: Choice, expected: Choice) -> None:
    for field in fields(Choice):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(ours, Tensor):
            # The memory behind a view, too: what lies beside it must be untouched.
            ours = ours if ours._base is None else ours._base
            theirs = theirs if theirs._base is None else theirs._base
            assert torch.equal(ours, theirs), field.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 37), (3, 150), (18, 64)])
def test_choose_over_several_steps(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits = exact(STEPS - 1, rows, columns, seed=rows).to(device, dtype)
    first = logits[0, 0].float().argmax().item()
    actual = build_choice(rows, device, stops=(int(first), 12, 3))
    expected = build_choice(rows, device, stops=(int(first), 12, 3))
    for each in logits:
        sampler.choose(each, actual, config={"BLOCK_V": 64, "num_warps": 4})
        fused.choose(each, expected)
    assert_same(actual, expected)
    assert not actual.unfinished[0] and actual.tokens[0] == 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_choose_takes_the_first_of_equal_maxima(dtype: torch.dtype, device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.full((7, 100), -2.0, dtype=dtype, device=device)
    logits[0, [40, 31, 99]] = 1.0
    logits[1, 70] = -1.0
    logits[2, 50], logits[2, 20] = 0.0, -0.0
    logits[3] = -inf
    logits[4, 60], logits[4, 20], logits[4, 80] = nan, inf, nan
    logits[5, [33, 98]] = inf
    actual, expected = build_choice(7, device), build_choice(7, device)
    actual.unfinished.fill_(1)
    expected.unfinished.fill_(1)
    sampler.choose(logits, actual, config={"BLOCK_V": 32, "num_warps": 4})
    fused.choose(logits, expected)
    assert_same(actual, expected)
    assert actual.tokens.tolist() == [31, 70, 20, 0, 60, 33, 0]


def test_choose_without_rows_takes_a_step(device: torch.device) -> None:
    actual = build_choice(0, device)
    with recording() as account:
        sampler.choose(torch.empty(0, 10, device=device), actual)
    assert actual.step.tolist() == [1]
    assert account.by_kernel() == {"finish": (1, 1)}


def test_a_step_beyond_the_history_writes_no_memory(device: torch.device) -> None:
    actual = build_choice(2, device)
    whole = actual.history._base
    assert whole is not None
    actual.step.fill_(STEPS - 1)
    short = Choice(
        **{f.name: getattr(actual, f.name) for f in fields(Choice)}
        | {"history": actual.history[: STEPS - 1]}
    )
    sampler.choose(torch.zeros(2, 10, device=device), short)
    assert (whole == -1).all()


def test_choose_launches_twice_and_reads_nothing_back() -> None:
    choice = build_choice(5, torch.device("meta"), stops=(1,))
    with recording(is_dry=True) as account:
        sampler.choose(torch.empty(5, 32064, device="meta"), choice)
    assert account.by_kernel() == {"maxima": (1, 5 * 32), "finish": (1, 1)}


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_advance(rows: int, device: torch.device) -> None:
    actual, expected = build_choice(rows, device), build_choice(rows, device)
    sampler.advance(actual)
    fused.advance(expected)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("has_places", [False, True])
def test_embed(has_places: bool, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    table = exact(11, 70, seed=1).to(device, dtype)
    places, positions = None, torch.tensor([4, 0, 6, 6, 1][:rows], dtype=torch.int32, device=device)
    if has_places:
        places = exact(9, 70, seed=2).to(device, dtype)[2:]
    tokens = torch.tensor([10, 0, 3, 3, 9][:rows], dtype=torch.int64, device=device)
    out = torch.full((rows + 1, 80), 5.0, dtype=dtype, device=device)
    expected = torch.empty(rows, 70, dtype=dtype, device=device)
    for embed, into in ((sampler.embed, out[:rows, :70]), (fused.embed, expected)):
        embed(tokens, table, into, positions=positions, places=places)
    assert torch.equal(out[:rows, :70], expected)
    by_hand = table[tokens] if places is None else table[tokens] + places[positions.long()]
    assert torch.equal(expected, by_hand)
    assert (out[rows:] == 5).all() and (out[:, 70:] == 5).all()


def test_gradients_are_refused(device: torch.device) -> None:
    logits = torch.zeros(1, 4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="logits: requires a gradient"):
        sampler.choose(logits, build_choice(1, device))
