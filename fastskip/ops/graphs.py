"""CUDA graphs: work at fixed addresses, captured once and replayed with one call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch

# Runs before a capture: kernels compile, libraries allocate their workspaces.
_WARM_UPS = 2
# Captures on a device share a stream, whatever their thread, so they run one by one.
_CAPTURING = Lock()


def capture(work: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """A function that repeats ``work``; on CUDA by replaying a graph of it.

    ``work`` must read and write the same addresses every time and never sync with the device; it
    runs a few times here, so nothing it writes may matter yet. ``pool``: the memory pool for what
    it allocates, shared by graphs that never run at the same time. On other devices the result is
    ``work`` itself.
    """
    if device.type != "cuda":
        return work
    with _CAPTURING, torch.cuda.device(device), _without_collection():
        current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(torch.cuda.current_device())
        # Another thread's calls (a pinned allocation, say) must not end this capture.
        mode = "thread_local"
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                work()
        finally:  # torch stays on the capture stream if ending the capture fails
            torch.cuda.set_stream(current)
    replay: Callable[[], None] = graph.replay
    return replay


@contextmanager
def _without_collection() -> Iterator[None]:
    """Within this block the garbage collector is off: among what it finds may be a graph, and
    destroying one invalidates a capture. (Until version 2.8 torch collected before each.)"""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """A device's only warm-up stream, since libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """A device's capture stream: torch's own belongs to the device that captured first."""
    return torch.cuda.Stream(device)


def new_pool(device: torch.device) -> Any:
    """A memory pool for ``capture``; ``None`` where there are no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
