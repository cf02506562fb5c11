"""Decisions that ride in a residual update: those of the torch form on the rows that it leaves."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels import residual, riding
from fastskip.kernels.launch import recording
from fastskip.ops import fused
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import Linear, Term
from fastskip.ops.routes import Agreement, Chosen, Group, Move, Route, Score, Verdict
from tests.kernels.paging import exact
from tests.kernels.scenes import SIZE, TRUTH, UNTOUCHED, Scene

INNER = (40, 16)
SMALL = {"BLOCK_M": 8, "BLOCK_E": 64, "STAGES": 1, "num_warps": 4}
CONFIGS = {
    "one row": {**SMALL, "BLOCK_N": 1},
    "two rows": {**SMALL, "BLOCK_N": 2},
    "matrix": {**SMALL, "BLOCK_M": 16, "BLOCK_N": 16},
}
FORMS = (
    ("one row", torch.bfloat16),
    ("two rows", torch.float32),
    ("two rows", torch.float16),
    ("matrix", torch.float16),
    ("matrix", torch.bfloat16),
)
PROGRAMS = 4
"""Of a guarded launch: fewer than tiles, so that programs have several."""
RUNS = {"some": (1, 0, 1, 1, 0, 0, 1), "none": (0,) * 7, "all": (1,) * 7}
CHOSEN: dict[str, Sequence[str | None]] = {
    "everybody, twice": (None, None),
    "some": ("some",),
    "nobody": ("none",),
    "second": ("none", "some"),
    "all of one": (None, "none"),
}


@dataclass(frozen=True)
class Update:
    """A residual update of seven rows, and the scene in which is decided after it."""

    chosen: Sequence[str | None] = (None,)
    config: str = "two rows"
    scene: Scene = Scene(rows=7)

    def terms(self, dtype: torch.dtype, device: torch.device | str) -> list[Term]:
        def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
            return exact(*shape, seed=seed, scale=scale).to(device, dtype)

        return [
            Term(
                numbers(self.scene.rows, size, seed=size),
                Linear(numbers(SIZE, size, seed=size + 1, scale=size**-0.5)),
            )
            for size in INNER[: len(self.chosen)]
        ]

    def rows(self, device: torch.device | str) -> list[Chosen | None]:
        return [
            None if name is None else Chosen(torch.tensor(RUNS[name]).int().to(device))
            for name in self.chosen
        ]

    def run(self, dtype: torch.dtype, device: torch.device, then: Route | None) -> Tensor:
        """The rows that the kernel leaves."""
        h = self.scene.h(dtype, device)
        config = {**CONFIGS[self.config], "PROGRAMS": PROGRAMS}
        with poisoned(), recording() as account:
            residual.add_terms_(
                h,
                self.terms(dtype, device),
                chosen=self.rows(device),
                then=then,
                config=config,
            )
        assert [each.name for each in account.launches] == ["add_terms"]
        return h

    def truth(self) -> Tensor:
        h = self.scene.h(TRUTH)
        return fused.add_terms_(h, self.terms(TRUTH, "cpu"), chosen=self.rows("cpu"))

    def check(
        self,
        found: Sequence[Verdict],
        dtype: torch.dtype,
        move: Move,
        device: torch.device | None = None,
    ) -> Route:
        """Decides on both ways, on the very same rows; ``device``: needed without verdicts."""
        device = device or torch.device(found[0].runs.device)
        theirs = [replace(each, runs=each.runs.clone()) for each in found]
        ours, eager = (self.scene.route(dtype, each, device, move) for each in (found, theirs))
        h = self.run(dtype, device, ours)
        fused.route(h, eager)
        assert ours.trace is not None and eager.trace is not None
        assert torch.equal(ours.trace.snapshot, eager.trace.snapshot)
        torch.testing.assert_close(ours.trace.found, eager.trace.found)
        for own, other in zip(found, theirs, strict=True):
            assert own.runs.tolist() == other.runs.tolist(), own
            idle = ~own.candidates.bool()
            assert (own.runs[idle] == UNTOUCHED).all() and (own.runs[~idle] < 2).all()
        assert not ours.arrivals.any()
        return ours


@pytest.mark.parametrize(("config", "dtype"), FORMS)
@pytest.mark.parametrize("chosen", CHOSEN)
def test_an_update_and_what_is_decided_after_it(
    chosen: str, config: str, dtype: torch.dtype, device: torch.device
) -> None:
    update = Update(CHOSEN[chosen], config)
    verdicts = [
        update.scene.verdict(
            device, score=score, bar=update.scene.bar(Move.NEXT, update.truth(), score=score)
        )
        for score in (Score.COSINE, Score.LINEAR)
    ]
    update.check(verdicts, dtype, Move.NEXT)
    for verdict in verdicts:
        found = verdict.runs[verdict.candidates.bool()]
        assert found.any() and not found.all()


def test_an_update_is_the_same_whether_it_carries_decisions_or_not(device: torch.device) -> None:
    update = Update(("some",))
    taken = update.scene.route(torch.bfloat16, [], device)
    found = [update.run(torch.bfloat16, device, then) for then in (taken, None)]
    assert torch.equal(*found)
    idle = ~torch.tensor(RUNS["some"]).bool()
    assert torch.equal(found[0][idle], update.scene.h(torch.bfloat16, device)[idle])


@pytest.mark.parametrize("move", Move)
@pytest.mark.parametrize("score", Score)
def test_every_score_after_every_move(score: Score, move: Move, device: torch.device) -> None:
    update = Update(("some",), scene=Scene(rows=7, is_new=False))
    is_blank = move is Move.START and score in (Score.COSINE, Score.CHANGE)
    bar = 0.0 if is_blank else update.scene.bar(move, update.truth(), score=score)
    update.check([update.scene.verdict(device, score=score, bar=bar)], torch.bfloat16, move)


@pytest.mark.parametrize("move", Move)
def test_a_trace_moves_without_verdicts(move: Move, device: torch.device) -> None:
    Update(("some",)).check([], torch.bfloat16, move, device)


@pytest.mark.parametrize("agreement", Agreement)
@pytest.mark.parametrize("group", (Group.SEQUENCE, Group.BATCH))
@pytest.mark.parametrize("score", Score)
def test_groups(score: Score, group: Group, agreement: Agreement, device: torch.device) -> None:
    """Of any rows, though in a step a sequence has one."""
    update = Update(("some",), scene=Scene(rows=7, is_new=False))
    terms: dict[str, Any] = {"score": score, "group": group, "agreement": agreement}
    # Of a group with both kinds of rows, and a bar that only some reach.
    bars = (update.scene.bar(Move.NEXT, update.truth(), **terms), -0.6)
    verdicts = [update.scene.verdict(device, bar=bar, **terms) for bar in bars]
    update.check(verdicts, torch.float32, Move.NEXT)


def test_verdicts_in_order(device: torch.device) -> None:
    """Each may ask for those whom the one before it lets run."""
    update = Update()
    low = update.scene.bar(Move.NONE, update.truth(), score=Score.LINEAR)
    for kinds in list(itertools.permutations(Group))[::2]:
        found = []
        for is_ours in (True, False):
            chain: list[Verdict] = []
            for kind in kinds:
                bar = low if kind is Group.ROW else 1e6
                own = update.scene.verdict(device, score=Score.LINEAR, bar=bar, group=kind)
                own.runs.zero_()
                chain.append(replace(own, candidates=chain[-1].runs) if chain else own)
            taken = update.scene.route(torch.float32, chain, device)
            h = update.run(torch.float32, device, taken if is_ours else None)
            if not is_ours:
                fused.route(h, taken)
            found.append([own.runs.tolist() for own in chain])
        assert found[0] == found[1] and any(found[0][-1])


def test_one_row(device: torch.device) -> None:
    update = Update(config="one row", scene=Scene(rows=1))
    verdict = update.scene.verdict(device, score=Score.LINEAR, bar=0.0)
    verdict.candidates.fill_(1)
    update.check([verdict], torch.bfloat16, Move.NEXT)


def test_rows_that_are_not_numbers_run(device: torch.device) -> None:
    update = Update(("none",))
    verdict = update.scene.verdict(device, score=Score.LINEAR, bar=-1e6)
    taken = update.scene.route(torch.float32, [verdict], device, Move.START)
    h = update.scene.h(torch.float32, device)
    h[::2] = math.nan
    residual.add_terms_(
        h,
        update.terms(torch.float32, device),
        chosen=update.rows(device),
        then=taken,
        config=CONFIGS["two rows"],
    )
    members = verdict.candidates.bool()
    expected = h.isnan().any(1).int()
    assert torch.equal(verdict.runs[members], expected[members])


def test_changes_of_a_pair_count(device: torch.device) -> None:
    """What is decided on is the sum of all that is added."""
    update = Update((None, None))
    verdicts = [
        update.scene.verdict(device, score=Score.LINEAR, bar=bar) for bar in (-0.5, 0.0, 0.5)
    ]
    theirs = [replace(each, runs=each.runs.clone()) for each in verdicts]
    changes = [exact(7, SIZE, seed=50 + number).float().to(device) for number in range(2)]
    ours = update.scene.h(torch.float32, device)
    residual.add_terms_(
        ours,
        update.terms(torch.float32, device),
        changes=changes,
        factor=0.5,
        then=update.scene.route(torch.float32, verdicts, device),
        config=CONFIGS["two rows"],
    )
    fused.route(ours, update.scene.route(torch.float32, theirs, device))
    assert [own.runs.tolist() for own in verdicts] == [own.runs.tolist() for own in theirs]
    plain = update.run(torch.float32, device, None)
    assert not torch.equal(ours, plain)


def test_no_rows(device: torch.device) -> None:
    scene = Scene(rows=0)
    update = Update(scene=scene)
    residual.add_terms_(
        scene.h(torch.float32, device),
        update.terms(torch.float32, device),
        then=scene.route(torch.float32, [scene.verdict(device, score=Score.COSINE)], device),
    )


def test_what_cannot_ride_is_refused(device: torch.device) -> None:
    scene = Scene(rows=7)
    few = scene.route(torch.float32, [scene.verdict(score=Score.LINEAR, capacity=0.5)])
    fits = scene.route(torch.float32, [scene.verdict(score=Score.LINEAR)])
    assert not riding.can_ride(few, 7) and not riding.can_ride(fits, 65)
    assert riding.can_ride(fits, 64)
    update = Update()
    h, terms = scene.h(torch.float32, device), update.terms(torch.float32, device)
    with pytest.raises(ValueError, match="then: 7 rows, capacities"):
        residual.add_terms_(h, terms, then=few)
    with pytest.raises(ValueError, match="then: given with an index"):
        residual.add_terms_(h, terms, then=fits, index=torch.arange(7, dtype=torch.int32))
