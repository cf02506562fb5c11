"""Launches that overlap: a kernel starts while the one before it ends (sm_90 and later).

CUDA's programmatic dependent launch. Once every program of a kernel has begun, the next kernel may
take the multiprocessors that become free; its programs then wait until all work before them is
complete and can be seen. So ramps and tails of a chain of short kernels lie over each other.

Two rules make it right, whatever a kernel computes: ``begin`` comes before the first access to
memory, and no program ends without it (else the kernel after could pass the one before). What is
done ahead of the wait reads nothing: lines of the weights are asked into the L2 cache, so that
memory is busy while a kernel before, like the attention of a step, leaves it idle. A guarded launch
asks for none, since its weights may not be needed. ``benchmarks.compile_gate`` checks the machine
code for both rules.

Kernels that take part have a last constant ``OVERLAP``, which ``launch`` gives: ``None`` for an
ordinary launch, else the bytes of each weight row to ask for ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
import triton.language as tl

LINE = tl.constexpr(128)
"""Bytes that one thread asks for at once."""

_WITH_WEIGHTS = frozenset({"weights", "first"})
"""Arguments that weights come in; kernels without them are built once for all distances."""

_ahead: ContextVar[int | None] = ContextVar("ahead", default=None)


@contextmanager
def overlapping(ahead: int | None) -> Iterator[None]:
    """Launches of this block overlap, as far as their kernels take part.

    ``ahead``: bytes of each weight row to ask for before the wait; ``None`` is the ordinary launch.
    """
    token = _ahead.set(ahead)
    try:
        yield
    finally:
        _ahead.reset(token)


def arguments_of(kernel: Any, *, is_guarded: bool) -> Mapping[str, Any]:
    """What a kernel is told of it: its constant, if it has one."""
    ahead = _ahead.get()
    if "OVERLAP" not in kernel.arg_names:
        return {}
    asks = not is_guarded and not _WITH_WEIGHTS.isdisjoint(kernel.arg_names)
    return {"OVERLAP": ahead if ahead is None or asks else 0}


@triton.jit
def begin():
    """Lets the next kernel start, then waits for all that was launched before."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def begin_with(weights, m, E: tl.constexpr, AHEAD: tl.constexpr):
    """``begin``, with the first ``AHEAD`` bytes of weight rows ``m [M]`` of ``E`` elements under
    way to the L2 cache before the wait."""
    tl.extra.cuda.gdc_launch_dependents()
    SIZE: tl.constexpr = weights.weight.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = min(AHEAD, E * SIZE) // LINE
    if LINES > 0:
        # Powers of two are what a block of numbers has; some lines at the end are left out.
        BLOCK: tl.constexpr = triton.next_power_of_2(LINES + 1) // 2
        row = (weights.weight + m.to(tl.int64) * weights.stride).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [row[:, None] + tl.arange(0, BLOCK)[None] * LINE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.extra.cuda.gdc_wait()
