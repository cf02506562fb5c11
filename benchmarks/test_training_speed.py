"""Forward, backward and whole training steps, dense and under policies; see `training`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.peers import DEFAULT
from benchmarks.records import environment
from benchmarks.replay import fail_if_wrong, items, replay
from benchmarks.shapes import DEMO, HALF_BILLION, Shape
from benchmarks.training import GROUPS, TrainingCase, measure_training, speed_ups
from fastskip.study.training import Parts

# Arrangements save launches, which a CPU hardly notices; the gate does not cover removed rows.
PEERS = tuple(peer for peer in DEFAULT[:-2] if peer.name != "fastv")
measured = cache(measure_training)


def _cases(shape: Shape, batch: int, rounds: int) -> list[TrainingCase]:
    return [
        TrainingCase(shape, torch.float32, batch, parts, PEERS, rounds)
        for parts in (Parts.PROJECTOR, Parts.EVERYTHING)
    ]


# The first item of a case measures all of it.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("case", "group", "peer"),
    [
        *items(_cases(DEMO, 4, 9), GROUPS),
        *items(_cases(HALF_BILLION, 1, 3), GROUPS, pytest.mark.full),
    ],
)
def test_training_speed(case: TrainingCase, group: str, peer: str, benchmark: Any) -> None:
    measurement = measured(case)
    fail_if_wrong(peer, measurement.failures)
    samples = measurement.samples(peer, group)
    benchmark.extra_info.update(
        case=case.name,
        peer=peer,
        median_ms=1e3 * measurement.seconds(peer, group),
        threads=torch.get_num_threads(),
        **speed_ups(measurement, peer, group),
        **environment("cpu"),
    )
    replay(benchmark, samples)
