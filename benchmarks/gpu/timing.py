"""How long device work takes: replays of a CUDA graph between events; the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from math import ceil

import torch

Call = Callable[[], object]

REPLAY_S = 3e-3
"""Least seconds of a replay, so that the gap before a graph's first node is negligible."""
REPLAYS = 9
MOST_CALLS = 256


def seconds(calls: Sequence[Call], device: torch.device, replays: int = REPLAYS) -> float:
    """Median seconds of one call; ``calls`` are the same work on different memory, run in turn."""
    if device.type != "cuda":
        return _on_cpu(calls)
    for call in calls:
        call()
    once = captured(lambda: [call() for call in calls])
    once.replay()
    estimate = _between_events(once.replay) / len(calls)
    turns = ceil(min(REPLAY_S / estimate, MOST_CALLS) / len(calls))
    graph = captured(lambda: [call() for _ in range(turns) for call in calls])
    graph.replay()
    times = [_between_events(graph.replay) for _ in range(replays)]
    return statistics.median(times) / (turns * len(calls))


def eager_seconds(call: Call, device: torch.device, runs: int = REPLAYS) -> float:
    """Median seconds of one call including its launches, as seen from the host."""
    call()
    times = []
    for _ in range(runs):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """``call`` as a CUDA graph. Its one-time work (compiling, handles) must be done already."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of ``nbytes`` of weights make reads miss the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, ceil(4 * cache / max(nbytes, 1))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _between_events(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_cpu(calls: Sequence[Call]) -> float:
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
