"""Launches that overlap: a kernel is set up while the one before it ends (sm_90 and later).

CUDA's programmatic dependent launch. When all programs of a kernel have ended, those of the next
one begin, while what was written is still on its way to where they see it; they wait for that.

Two rules make it right, whatever a kernel computes: ``wait`` comes before the first access to
memory, and no program ends without it (else the kernel after could pass the one before).
``benchmarks.compile_gate`` checks the machine code for both.

A kernel could let the next one begin earlier. On an H200 that costs a tenth of a step: programs
that come while others still run go to the multiprocessors that are free just then, so that the next
kernel's load is spread unevenly. Nor does it help to ask for the next weights ahead of their use:
what is in the L2 cache already streams no faster to few rows than what comes from memory.

Kernels that take part have a last constant ``OVERLAP``, which ``launch`` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
import triton.language as tl

_overlaps: ContextVar[bool] = ContextVar("overlaps", default=False)


@contextmanager
def overlapping(overlaps: bool) -> Iterator[None]:
    """Whether launches of this block overlap, as far as their kernels take part."""
    token = _overlaps.set(overlaps)
    try:
        yield
    finally:
        _overlaps.reset(token)


def arguments_of(kernel: Any) -> Mapping[str, Any]:
    """What a kernel is told of it: its constant, if it has one."""
    return {"OVERLAP": _overlaps.get()} if "OVERLAP" in kernel.arg_names else {}


@triton.jit
def wait():
    """Waits for all that was launched before."""
    tl.extra.cuda.gdc_wait()
