"""Named ranges for profilers, off by default: phases, layers and sublayers on the timeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_is_on: ContextVar[bool] = ContextVar("ranges", default=False)


@contextmanager
def ranges() -> Iterator[None]:
    """Within this block ``span`` names what runs, for Nsight (NVTX) and ``torch.profiler``.

    Decode steps then launch kernel by kernel instead of replaying a graph, whose nodes no range
    could name; so look at shares, not at step times.
    """
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


def ranges_enabled() -> bool:
    """Whether this code runs within ``ranges()``."""
    return _is_on.get()


def span(name: str) -> AbstractContextManager[None]:
    """A range around a block, if ranges are on."""
    return _span(name) if _is_on.get() else nullcontext()


@contextmanager
def _span(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield
