"""Prefill, decode and e2e of every case and peer; see the package's docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import default_cases, full_cases
from benchmarks.harness import Case, Measurement
from benchmarks.records import Record, record
from benchmarks.replay import fail_if_wrong, items, replay
from benchmarks.runs import GROUPS


# The first item of a case measures all of it.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("case", "group", "peer"),
    [*items(default_cases(), GROUPS), *items(full_cases(), GROUPS, pytest.mark.full)],
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
    fail_if_wrong(peer, measurement.failures)
    found = record(measurement, peer, group)
    records.append(found)
    benchmark.extra_info.update(found)
    replay(benchmark, [milliseconds / 1e3 for milliseconds in found["samples_ms"]])
