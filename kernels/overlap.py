"""Overlapping launches: a kernel is set up while the previous one finishes (sm_90 and later).

This is CUDA's programmatic dependent launch. When all programs of a kernel have ended, those of the
next one begin, while the earlier writes are still on their way to becoming visible; they wait for
that.

Two rules make this correct, whatever a kernel computes: ``wait`` precedes the first memory access,
and no program exits without it (else the following kernel could overtake the preceding one). On
request, data written before the previous kernel began may be read ahead of ``wait``, since that
kernel has waited for it; ``read`` does so and bypasses the L1 cache. ``benchmarks.compile_gate``
checks all of this in the machine code.

A kernel could let the next one begin earlier. On an H200 that makes a step a tenth slower: programs
that start while others still run land on whichever multiprocessors are free, which spreads the next
kernel's load unevenly. Prefetching the next weights does not help either: for few rows, weights in
the L2 cache stream no faster than from memory.

Kernels that take part have a constexpr ``OVERLAP``, which ``launch`` sets; those that can read
ahead also have ``READS_AHEAD``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
import triton.language as tl

_modes: ContextVar[tuple[bool, bool]] = ContextVar("overlap", default=(False, False))
"""Whether launches overlap, and whether they read ahead."""


@contextmanager
def overlapping(overlaps: bool, *, reads_ahead: bool = False) -> Iterator[None]:
    """Whether launches of this block overlap, and read ahead of their wait, for kernels that take
    part."""
    token = _modes.set((overlaps, reads_ahead))
    try:
        yield
    finally:
        _modes.reset(token)


def arguments_of(kernel: Any) -> Mapping[str, Any]:
    """Those of the constants ``OVERLAP`` and ``READS_AHEAD`` that ``kernel`` takes."""
    overlaps, reads_ahead = _modes.get()
    constants = {"OVERLAP": overlaps, "READS_AHEAD": reads_ahead}
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


@triton.jit
def wait():
    """Waits until all earlier launches have completed and their writes are visible."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def read(pointer, mask, READS_AHEAD: tl.constexpr):
    """Loads what was written before the previous launch began; masked elements are 0.

    ``READS_AHEAD``: this launch may not have waited yet.
    """
    CACHE: tl.constexpr = ".cg" if READS_AHEAD else ""
    return tl.load(pointer, mask=mask, other=0, cache_modifier=CACHE)


@triton.jit
def touch(pointer):
    """Prefetches what will be read soon."""
    tl.load(pointer, volatile=True)
