"""Benchmark items that replay recorded durations: one for each case, group and peer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

from benchmarks.peers import DENSE, HF


class ReplayClock:
    """A timer that replays recorded durations: each call of `play` advances it by the next one."""

    def __init__(self) -> None:
        self.now = 0.0
        self._durations: Iterator[float] = iter(())

    def __repr__(self) -> str:  # what pytest-benchmark records as the timer
        return type(self).__name__

    def __call__(self) -> float:
        return self.now

    def load(self, durations: Sequence[float]) -> None:
        self.now, self._durations = 0.0, iter(durations)

    def play(self) -> None:
        self.now += next(self._durations)


CLOCK = ReplayClock()


def items(
    cases: Iterable[Any], groups: Collection[str], *marks: pytest.MarkDecorator
) -> list[ParameterSet]:
    """A parameter set for each case, group and peer."""
    return [
        pytest.param(
            case,
            group,
            peer.name,
            id=f"{group}-{case.name}-{peer.name}",
            marks=[*marks, pytest.mark.benchmark(group=group, timer=CLOCK)],
        )
        for case in cases
        for group in groups
        for peer in case.peers
    ]


def fail_if_wrong(peer: str, failures: Mapping[str, str]) -> None:
    """Fails the item if the peer or a baseline is wrong."""
    for name in (peer, DENSE.name, HF.name):
        if name in failures:
            pytest.fail(f"{name} is wrong, so its time means nothing: {failures[name]}")


def replay(benchmark: Any, seconds: Sequence[float]) -> None:
    """Lets pytest-benchmark time these durations; its timer must be `CLOCK`."""
    CLOCK.load(seconds)
    benchmark.pedantic(CLOCK.play, rounds=len(seconds))
