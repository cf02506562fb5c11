"""CUDA graphs: work at fixed addresses, captured once and replayed with one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Any

import torch

from fastskip.garbage import no_collection

# Runs before a capture: kernels compile, libraries allocate their workspaces.
_WARM_UPS = 2
# Captures share a stream for warm-ups, whatever their thread, so they run one by one.
_CAPTURING = Lock()


@dataclass(frozen=True, slots=True)
class Pool:
    """What graphs that never run at the same time share: memory, and the stream of their captures.

    Graphs of other memory must not share that stream. Library products need a workspace per stream,
    which lies in the memory of the first graph that asks for one; from 2.12 on, torch frees it with
    any graph of the stream. Those that go on using it may only write to what is theirs together.
    """

    device: torch.device
    memory: Any
    stream: Any

    @classmethod
    def on(cls, device: torch.device) -> Pool | None:
        """A new pool; ``None`` where there are no graphs."""
        if device.type != "cuda":
            return None
        return cls(device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))

    def renewed(self) -> Pool:
        """The same stream with other memory, once all graphs of the pool are gone: torch has only
        so many streams, and hands them out again."""
        return replace(self, memory=torch.cuda.graph_pool_handle())


def capture(
    work: Callable[[], None], device: torch.device, pool: Pool | None = None
) -> Callable[[], None]:
    """A function that repeats ``work``; on CUDA by replaying a graph of it.

    ``work`` must read and write the same addresses every time and never sync with the device; it
    runs a few times here, so nothing it writes may matter yet. ``pool``: for what it allocates; a
    new one by default. On other devices the result is ``work`` itself.
    """
    pool = pool or Pool.on(device)
    if pool is None:
        return work
    # Among what the collector finds may be a graph, and destroying one invalidates a capture.
    # (Until version 2.8 torch collected before each.)
    with _CAPTURING, torch.cuda.device(device), no_collection():
        current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread's calls (a pinned allocation, say) must not end this capture.
        options: Any = {"stream": pool.stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, pool=pool.memory, **options):
                work()
        finally:  # torch stays on the capture stream if ending the capture fails
            torch.cuda.set_stream(current)
    replay: Callable[[], None] = graph.replay
    return replay


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """A device's only warm-up stream, since libraries keep a workspace per stream."""
    return torch.cuda.Stream(device)
