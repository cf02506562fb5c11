"""Sets the conditions of CUDA graph nodes on the device; for an IF node: whether any row runs.

    condition of ``handle`` = any(runs[n] != 0)                        ``runs [n]`` int32

One program of one warp, all of whose threads set the same value. ``cudaGraphSetConditional`` is a
function that the driver provides to every kernel: the assembler knows it, and the loader resolves
it. It returns nothing; declaring it with an int result that nothing reads changes no instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import core

from fastskip.kernels.launch import launch


@core.extern
def set_conditional(handle, value, _semantic=None):
    """Sets the condition of a node: ``handle`` int64, ``value`` int32."""
    kinds = core.dtype("int64"), core.dtype("int32")
    symbol = "cudaGraphSetConditional", core.dtype("int32")
    return core.extern_elementwise(
        "", "", [handle, value], {kinds: symbol}, is_pure=False, _semantic=_semantic
    )


@triton.jit(do_not_specialize=["handle", "rows"])
def _set_condition_kernel(runs_ptr, handle: tl.int64, rows, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    runs = tl.load(runs_ptr + n, mask=n < rows, other=0)
    some = tl.max((runs != 0).to(tl.int32), 0)
    if handle != 0:
        set_conditional(handle, some)


def set_condition(runs: Tensor, handle: int) -> None:
    """Sets the condition of a node; with handle 0 it only compiles and loads the kernel."""
    launch(
        _set_condition_kernel,
        (1,),
        {"num_warps": 1},
        runs_ptr=runs,
        handle=signed(handle),
        rows=len(runs),
        BLOCK=triton.next_power_of_2(max(32, len(runs))),
    )


def signed(handle: int) -> int:
    """The 64 bits of a handle as the signed integer that kernels take."""
    return (handle + (1 << 63)) % (1 << 64) - (1 << 63)
