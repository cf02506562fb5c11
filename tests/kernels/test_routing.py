"""Decisions of many rows against their torch form: the very same flags, away from the bars."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastskip.kernels import verdicts
from fastskip.kernels.launch import recording
from fastskip.kernels.routing import candidates, place_entries, route
from fastskip.ops import fused, fused_routes
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import Bounds
from fastskip.ops.routes import Agreement, Group, Move, Score, Verdict, draw, signed
from tests.budget import assert_within_budget
from tests.kernels.scenes import SALT, SIZE, TRUTH, UNTOUCHED, Scene

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONFIG = {"BLOCK_R": 8, "BLOCK": 16, "num_warps": 4}
GROUPS = (Group.SEQUENCE, Group.BATCH)


def check(scene: Scene, found: list[Verdict], dtype: torch.dtype, move: Move = Move.NONE) -> None:
    """Decides on both ways; ``found`` are the verdicts of ours."""
    device = found[0].runs.device
    theirs = [replace(each, runs=each.runs.clone()) for each in found]
    h = scene.h(dtype, device)
    ours, eager = (scene.route(dtype, each, device, move) for each in (found, theirs))
    with poisoned():
        route(h, ours, config=CONFIG)
    fused.route(h, eager)
    for own, other in zip(found, theirs, strict=True):
        assert own.runs.tolist() == other.runs.tolist(), own
        idle = ~own.candidates.bool()
        assert (own.runs[idle] == UNTOUCHED).all() and (own.runs[~idle] < 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", Move)
def test_traces_move_on(move: Move, dtype: torch.dtype, device: torch.device) -> None:
    scene = Scene()
    ours, eager, truth = (
        scene.route(each, [], where, move)
        for each, where in ((dtype, device), (dtype, device), (TRUTH, torch.device("cpu")))
    )
    h = scene.h(dtype, device)
    route(h, ours)
    fused.route(h, eager)
    fused.route(scene.h(TRUTH), truth)
    own, other, true = (each.trace for each in (ours, eager, truth))
    assert own is not None and other is not None and true is not None
    assert torch.equal(own.snapshot, other.snapshot)
    known = true.found.isfinite()
    assert torch.equal(own.found[~known.to(device)], other.found[~known.to(device)])
    if known.any():
        assert_within_budget("found", *(each.found.cpu()[known] for each in (own, other, true)))
    if move is Move.NEXT:
        still = ~(scene.ran()[0] & scene.ran()[1]).bool().to(device)
        assert torch.equal(own.found[still], scene.trace(dtype, device).found[still])


def test_rows_that_do_not_change_and_rows_of_zeros(device: torch.device) -> None:
    scene = Scene(rows=3)
    h = scene.h(torch.float32, device)
    h[1:] = 0
    results = []
    for form in (route, fused.route):
        taken = scene.route(torch.float32, [], device)
        assert taken.trace is not None
        taken.trace.snapshot.copy_(h)
        taken.trace.snapshot[2, 0] = 1  # becomes zero
        form(h, replace(taken, ran=[]))
        results.append(taken.trace.found)
    torch.testing.assert_close(*results)
    assert results[0][:, 1].tolist() == [0, 0, 1] and results[0][1, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("score", Score)
def test_rows_decide_alone(
    score: Score, move: Move, dtype: torch.dtype, device: torch.device
) -> None:
    scene = Scene(rows=9)
    # Nothing is known at the start: cosine and change have no finite score there.
    is_blank = move is Move.START and score in (Score.COSINE, Score.CHANGE)
    bar = 0.0 if is_blank else scene.bar(move, score=score)
    verdict = scene.verdict(device, score=score, bar=bar)
    check(scene, [verdict], dtype, move)
    chosen = verdict.runs[verdict.candidates.bool()]
    assert chosen.all() if is_blank else chosen.any() and not chosen.all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("agreement", Agreement)
@pytest.mark.parametrize("score", Score)
def test_groups_decide_together(
    score: Score, agreement: Agreement, group: Group, device: torch.device
) -> None:
    """Rows of a group lie in several blocks of ``decide``."""
    scene = Scene(rows=37, is_new=False)
    terms: dict[str, Any] = {"score": score, "group": group, "agreement": agreement}
    verdict = scene.verdict(device, bar=scene.bar(Move.NEXT, **terms), **terms)
    check(scene, [verdict], torch.float32, Move.NEXT)
    members = verdict.candidates.bool()
    for number in range(3):
        own = verdict.runs[members & (scene.numbers("sequences").to(device) == number)]
        assert len(own.unique()) <= 1
    if group is Group.BATCH:
        assert len(verdict.runs[members].unique()) == 1


@pytest.mark.parametrize("agreement", Agreement)
def test_bars_between_the_groups(agreement: Agreement, device: torch.device) -> None:
    """One sequence runs, the other does not."""
    for score in (Score.LINEAR, Score.COSINE):
        scene = Scene(rows=15, is_new=False)
        terms: dict[str, Any] = {"score": score, "agreement": agreement, "group": Group.SEQUENCE}
        taken = scene.route(TRUTH, [], move=Move.NONE)
        own = scene.verdict(**terms)
        assert taken.trace is not None
        scores = fused_routes.score(own, scene.h(TRUTH), taken.positions, taken.trace.found)
        each = [scores[own.candidates.bool() & (taken.sequences == number)] for number in (0, 2)]
        a, b = (x.mean() if agreement is Agreement.MEAN else x.min() for x in each)
        verdict = scene.verdict(device, **terms, bar=float(a + b) / 2)
        check(scene, [verdict], torch.float32)
        assert set(verdict.runs[verdict.candidates.bool()].tolist()) == {0, 1}


@pytest.mark.parametrize("rows", [12, 37])
@pytest.mark.parametrize("capacity", [0.07, 0.5, 0.7, 1.0, 0.0])
def test_a_sequence_runs_no_more_than_its_capacity(
    capacity: float, rows: int, device: torch.device
) -> None:
    scene = Scene(rows=rows)
    verdict = scene.verdict(device, score=Score.LINEAR, capacity=capacity)
    check(scene, [verdict], torch.float32)
    members = verdict.candidates.bool()
    for number in range(3):
        own = verdict.runs[members & (scene.numbers("sequences").to(device) == number)]
        assert int(own.sum()) == math.ceil(capacity * len(own))


@pytest.mark.parametrize(("capacity", "rows", "share"), [(0.07, 100, 8), (0.1, 10, 1)])
def test_a_share_is_rounded_as_python_rounds(
    capacity: float, rows: int, share: int, device: torch.device
) -> None:
    """The product of fp64, a little more than 7 for one; of fp32, a little more than 1."""
    scene = Scene(rows=rows)
    verdict = scene.verdict(device, score=Score.LINEAR, capacity=capacity)
    verdict.candidates.fill_(1)
    taken = scene.route(torch.float32, [verdict], device, Move.NONE)
    route(
        scene.h(torch.float32, device), replace(taken, sequences=torch.zeros_like(taken.sequences))
    )
    assert int(verdict.runs.sum()) == math.ceil(capacity * rows) == share


@pytest.mark.parametrize("capacity", [0.3, 0.5, 1.0])
def test_of_equals_the_earliest_run(capacity: float, device: torch.device) -> None:
    scene = Scene(rows=20)
    verdict = scene.verdict(device, score=Score.LINEAR, capacity=capacity)
    verdict = replace(verdict, weight=torch.zeros(SIZE, device=device))
    check(scene, [verdict], torch.float32)
    # Equal positions too: the first row of those.
    again = replace(verdict, runs=torch.full_like(verdict.runs, UNTOUCHED))
    taken = scene.route(torch.float32, [again], device, Move.NONE)
    route(scene.h(torch.float32, device), replace(taken, positions=taken.positions // 8))
    other = replace(again, runs=torch.full_like(verdict.runs, UNTOUCHED))
    taken = scene.route(torch.float32, [other], device, Move.NONE)
    fused.route(scene.h(torch.float32, device), replace(taken, positions=taken.positions // 8))
    assert again.runs.tolist() == other.runs.tolist()


@pytest.mark.parametrize("bar", [-math.inf, math.inf])
@pytest.mark.parametrize("score", [Score.COSINE, Score.CHANGE, Score.LINEAR])
@pytest.mark.parametrize("group", Group)
def test_infinite_bars_and_scores(
    group: Group, score: Score, bar: float, device: torch.device
) -> None:
    scene = Scene(rows=9)
    check(scene, [scene.verdict(device, score=score, group=group, bar=bar)], torch.float32)


@pytest.mark.parametrize("agreement", Agreement)
@pytest.mark.parametrize("group", Group)
def test_rows_that_are_not_numbers_run(
    group: Group, agreement: Agreement, device: torch.device
) -> None:
    scene = Scene(rows=9)
    h = scene.h(torch.float32, device)
    h[::2] = math.nan
    terms = {"score": Score.LINEAR, "bar": -1e6, "group": group, "agreement": agreement}
    found = [scene.verdict(device, **terms) for _ in range(2)]
    for form, verdict in zip((route, fused.route), found, strict=True):
        form(h, scene.route(torch.float32, [verdict], device, Move.NONE))
    assert found[0].runs.tolist() == found[1].runs.tolist()
    assert (found[0].runs[::2] > 0).all()
    assert group is not Group.ROW or 0 in found[0].runs


def test_rows_that_are_not_numbers_come_last(device: torch.device) -> None:
    scene = Scene(rows=20)
    h = scene.h(torch.float32, device)
    h[::3] = math.nan
    found = [scene.verdict(device, score=Score.LINEAR, capacity=0.8) for _ in range(2)]
    for form, verdict in zip((route, fused.route), found, strict=True):
        form(h, scene.route(torch.float32, [verdict], device, Move.NONE))
    assert found[0].runs.tolist() == found[1].runs.tolist()


@pytest.mark.parametrize("group", Group)
@pytest.mark.parametrize(("rate", "runs"), [(0.0, 1), (1.0, 0)])
def test_rates_of_nothing_and_of_all(
    rate: float, runs: int, group: Group, device: torch.device
) -> None:
    scene = Scene(rows=9)
    verdict = scene.verdict(device, score=Score.RANDOM, bar=-rate, group=group)
    check(scene, [verdict], torch.float32)
    assert (verdict.runs[verdict.candidates.bool()] == runs).all()


@pytest.mark.parametrize("salt", [0, 1, 16, SALT, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_draws_are_the_same_bits(salt: int, device: torch.device) -> None:
    """A bar at the very draw is reached, the next above it is not."""
    scene = Scene(rows=4)
    positions = scene.numbers("positions")
    for row, u in enumerate(draw(positions, salt).tolist()):
        assert 0 < u <= 1
        found = [
            scene.verdict(device, score=Score.RANDOM, salt=salt, bar=bar)
            for bar in (-u, -u + 2**-24)
        ]
        for verdict in found:
            verdict.candidates.fill_(1)
        route(scene.h(torch.float32, device), scene.route(torch.float32, found, device, Move.NONE))
        assert [int(verdict.runs[row]) for verdict in found] == [0, 1]


def test_salts_keep_their_bits() -> None:
    for salt in (0, 1, 0x7FFFFFFF, 0x80000000, SALT, 0xFFFFFFFF):
        number = signed(salt)
        assert -(2**31) <= number < 2**31 and number & 0xFFFFFFFF == salt


def test_several_verdicts_in_order(device: torch.device) -> None:
    """Each may ask for those whom the one before it lets run, whoever decides."""
    scene = Scene(rows=20)
    for kinds in itertools.permutations((Group.ROW, Group.SEQUENCE, Group.BATCH)):
        found = []
        for form in (route, fused.route):
            chain: list[Verdict] = []
            for kind in kinds:
                bar = 0.1 if kind is Group.ROW else 1e6
                own = scene.verdict(device, score=Score.LINEAR, bar=bar, group=kind)
                own.runs.zero_()
                chain.append(replace(own, candidates=chain[-1].runs) if chain else own)
            form(
                scene.h(torch.float32, device),
                scene.route(torch.float32, chain, device, Move.NONE),
            )
            found.append([own.runs.tolist() for own in chain])
        assert found[0] == found[1]
        assert any(found[0][-1])


def launched(scene: Scene, found: list[Verdict], move: Move) -> list[str]:
    with recording(is_dry=True) as account:
        route(scene.h(torch.float32), scene.route(torch.float32, found, move=move))
    return [each.name for each in account.launches]


def test_launches() -> None:
    scene = Scene()
    row = scene.verdict(score=Score.COSINE)
    random = scene.verdict(score=Score.RANDOM, group=Group.BATCH)
    grouped = scene.verdict(score=Score.LINEAR, group=Group.SEQUENCE)
    few = scene.verdict(score=Score.LINEAR, capacity=0.5)
    assert launched(scene, [], Move.NONE) == []
    assert launched(scene, [], Move.NEXT) == ["route"]
    assert launched(scene, [row, row, row], Move.NEXT) == ["route"]
    assert launched(scene, [row, grouped], Move.NEXT) == ["route", "decide"]
    assert launched(scene, [grouped, few], Move.NONE) == ["route", "decide", "decide"]
    assert launched(scene, [random], Move.NONE) == ["decide"]
    assert launched(scene, [random], Move.START) == ["route", "decide"]
    assert launched(scene, [grouped, row], Move.NEXT) == ["route", "decide", "route"]


@pytest.mark.parametrize("group", Group)
@pytest.mark.parametrize("scene", [Scene(rows=0), Scene(rows=5, has_candidates=False)])
def test_nobody_decides(scene: Scene, group: Group, device: torch.device) -> None:
    check(scene, [scene.verdict(device, score=Score.LINEAR, group=group)], torch.float32)


def test_views_are_read(device: torch.device) -> None:
    """Rows of the residual stream may lie in wider ones."""
    scene = Scene(rows=5)
    wide = torch.full((5, SIZE + 8), math.nan, device=device)
    h = wide[:, :SIZE].copy_(scene.h(torch.float32, device))
    own, other = (
        scene.verdict(device, score=Score.LINEAR, bar=scene.bar(score=Score.LINEAR))
        for _ in range(2)
    )
    route(h, scene.route(torch.float32, [own], device, Move.NEXT))
    fused.route(h, scene.route(torch.float32, [other], device, Move.NEXT))
    assert own.runs.tolist() == other.runs.tolist()


def test_gradients_are_refused(device: torch.device) -> None:
    scene = Scene()
    h = scene.h(torch.float32, device).requires_grad_()
    with pytest.raises(ValueError, match="h: requires a gradient"):
        route(h, scene.route(torch.float32, [], device))


def test_measures_are_those_of_the_torch_form() -> None:
    """Constants that both forms name must agree."""
    assert verdicts.TINY.value == fused_routes._TINY


PLACES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "several": ((0, 5, 5, 17, 40), (3, 0, 64, 1)),
    "one": ((0, 21), (0,)),
    "no rows": ((0, 0), (5,)),
    "rows of no sequence": ((0, 7, 9), (2, 3)),
    "no sequences": ((0,), ()),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_place_entries(name: str, share: float, device: torch.device) -> None:
    host, before = PLACES[name]
    bounds = Bounds.of(host, device)
    rows = host[-1] + 11 * (name == "rows of no sequence")
    generator = torch.Generator().manual_seed(2)
    held = (torch.rand(rows, generator=generator) < share).to(device, torch.int32)
    order = torch.randperm(rows, generator=generator).to(device, torch.int32)
    # A row of a table of counts.
    ours, theirs = (
        torch.tensor([[9] * len(before), before], dtype=torch.int32, device=device)
        for _ in range(2)
    )
    found = place_entries(held, order, bounds, ours[1], config={"BLOCK": 8, "num_warps": 4})
    expected = fused.place_entries(held, order, bounds, theirs[1])
    assert torch.equal(ours, theirs)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == torch.int32 and torch.equal(own, other)


@pytest.mark.parametrize("shape", [(896,), (4096,), (5120,), ()])
def test_there_are_candidates(shape: tuple[int, ...]) -> None:
    assert candidates(640, shape)
