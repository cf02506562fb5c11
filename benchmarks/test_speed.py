"""Prefill, decode and e2e of every case and peer; see the package's docstring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from benchmarks.cases import default_cases, full_cases
from benchmarks.harness import Case, Measurement, ReplayClock
from benchmarks.peers import DENSE, HF
from benchmarks.records import Record, record
from benchmarks.runs import GROUPS

CLOCK = ReplayClock()


def _items(cases: Iterable[Case], *marks: pytest.MarkDecorator) -> list[ParameterSet]:
    return [
        pytest.param(
            case,
            group,
            peer.name,
            id=f"{group}-{case.name}-{peer.name}",
            marks=[*marks, pytest.mark.benchmark(group=group, timer=CLOCK)],
        )
        for case in cases
        for group in GROUPS
        for peer in case.peers
    ]


# The first item of a case measures all of it.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("case", "group", "peer"),
    [*_items(default_cases()), *_items(full_cases(), pytest.mark.full)],
)
def test_speed(
    case: Case,
    group: str,
    peer: str,
    benchmark: Any,
    measured: Callable[[Case], Measurement],
    records: list[Record],
) -> None:
    measurement = measured(case)
    for name in (peer, DENSE.name, HF.name):  # no speed-up over baselines that are wrong
        if name in measurement.failures:
            pytest.fail(f"{name} is wrong, so its time means nothing: {measurement.failures[name]}")
    found = record(measurement, peer, group)
    records.append(found)
    benchmark.extra_info.update(found)
    CLOCK.load([milliseconds / 1e3 for milliseconds in found["samples_ms"]])
    benchmark.pedantic(CLOCK.play, rounds=len(found["samples_ms"]))
