"""Forward, backward and whole training steps, dense and under policies; see `training`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from benchmarks.harness import ReplayClock
from benchmarks.peers import DEFAULT, DENSE, HF
from benchmarks.records import environment
from benchmarks.shapes import DEMO, HALF_BILLION
from benchmarks.training import GROUPS, TrainingCase, measure_training, speed_ups
from fastskip.study.training import Parts

CLOCK = ReplayClock()
# Arrangements save launches, which a CPU hardly notices; the gate does not cover removed rows.
PEERS = tuple(peer for peer in DEFAULT[:-2] if peer.name != "fastv")
measured = cache(measure_training)


def _items() -> list[ParameterSet]:
    cases: list[tuple[TrainingCase, tuple[pytest.MarkDecorator, ...]]] = [
        (TrainingCase(DEMO, torch.float32, 4, parts, PEERS, rounds=9), ())
        for parts in (Parts.PROJECTOR, Parts.EVERYTHING)
    ]
    cases += [
        (TrainingCase(HALF_BILLION, torch.float32, 1, parts, PEERS, rounds=3), (pytest.mark.full,))
        for parts in (Parts.PROJECTOR, Parts.EVERYTHING)
    ]
    return [
        pytest.param(
            case,
            group,
            peer.name,
            id=f"{group}-{case.name}-{peer.name}",
            marks=[*marks, pytest.mark.benchmark(group=group, timer=CLOCK)],
        )
        for case, marks in cases
        for group in GROUPS
        for peer in case.peers
    ]


# The first item of a case measures all of it.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("case", "group", "peer"), _items())
def test_training_speed(case: TrainingCase, group: str, peer: str, benchmark: Any) -> None:
    measurement = measured(case)
    for name in (peer, DENSE.name, HF.name):
        if name in measurement.failures:
            pytest.fail(f"{name} is wrong, so its time means nothing: {measurement.failures[name]}")
    samples = measurement.samples(peer, group)
    benchmark.extra_info.update(
        case=case.name,
        peer=peer,
        median_ms=1e3 * measurement.seconds(peer, group),
        threads=torch.get_num_threads(),
        **speed_ups(measurement, peer, group),
        **environment("cpu"),
    )
    CLOCK.load(samples)
    benchmark.pedantic(CLOCK.play, rounds=len(samples))
