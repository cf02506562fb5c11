"""Launches that overlap: a kernel is set up while the one before it ends (sm_90 and later).

CUDA's programmatic dependent launch. When all programs of a kernel have ended, those of the next
one begin, while what was written is still on its way to where they see it; they wait for that.

Two rules make it right, whatever a kernel computes: ``wait`` comes before the first access to
memory, and no program ends without it (else the kernel after could pass the one before). What was
written before the kernel before began may be read ahead of ``wait``, if that is asked for, since
that one has waited for it; by ``read``, which no cache of the multiprocessor answers.
``benchmarks.compile_gate`` checks the machine code for all of that.

A kernel could let the next one begin earlier. On an H200 that costs a tenth of a step: programs
that come while others still run go to the multiprocessors that are free just then, so that the next
kernel's load is spread unevenly. Nor does it help to ask for the next weights ahead of their use:
what is in the L2 cache already streams no faster to few rows than what comes from memory.

Kernels that take part have a constant ``OVERLAP``, which ``launch`` gives; those that have
something to read ahead also ``READS_AHEAD``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
import triton.language as tl

_told: ContextVar[tuple[bool, bool]] = ContextVar("overlap", default=(False, False))
"""Whether launches overlap, and whether they read ahead."""


@contextmanager
def overlapping(overlaps: bool, *, reads_ahead: bool = False) -> Iterator[None]:
    """Whether launches of this block overlap, and read ahead of their wait, as far as their
    kernels take part."""
    token = _told.set((overlaps, reads_ahead))
    try:
        yield
    finally:
        _told.reset(token)


def arguments_of(kernel: Any) -> Mapping[str, Any]:
    """What a kernel is told of it: its constants, if it has some."""
    overlaps, reads_ahead = _told.get()
    told = {"OVERLAP": overlaps, "READS_AHEAD": reads_ahead}
    return {name: value for name, value in told.items() if name in kernel.arg_names}


@triton.jit
def wait():
    """Waits for all that was launched before."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def read(pointer, mask, READS_AHEAD: tl.constexpr):
    """What was written before the launch before this one began; masked numbers are 0.

    ``READS_AHEAD``: this launch may not have waited yet.
    """
    CACHE: tl.constexpr = ".cg" if READS_AHEAD else ""
    return tl.load(pointer, mask=mask, other=0, cache_modifier=CACHE)


@triton.jit
def touch(pointer):
    """Asks for what will be read soon."""
    tl.load(pointer, volatile=True)
