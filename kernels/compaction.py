"""Compacts a mask into row indices on the device, without a host sync.

    index[: count] = positions of the true elements of mask, ascending
    index[count :] = positions of the others
    body of the SWITCH node ``handle`` = ceil(count / STEP) - 1, none for a count of 0

``mask [N]`` -> ``index [N]``, ``count [1]``, int32. Grid ``(N / BLOCK,)``: each program counts the
true elements before its block, then places its own. Rereading the mask is cheaper than a second
launch as long as it fits in the L2 cache, and it needs neither scratch nor an order among programs:
false elements are placed from the end. Tuning table: ``compact``, shape ``()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, tuning
from fastskip.kernels.conditional import set_conditional, signed
from fastskip.kernels.launch import launch
from fastskip.ops.allocate import empty
from fastskip.ops.routes import Switch


@triton.jit(do_not_specialize=["handle"])
def _compact_kernel(
    mask_ptr, index_ptr, count_ptr, size, handle: tl.int64, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    # Earlier blocks are full: no mask. One reduction at the end instead of one per block.
    seen = tl.zeros([BLOCK], tl.int32)
    for start in range(0, block * BLOCK, BLOCK):
        seen += (numerics.load(mask_ptr + start + within) != 0).to(tl.int32)
    before = tl.sum(seen)

    row = block * BLOCK + within
    is_chosen = numerics.load(mask_ptr + row, row < size) != 0
    until = before + tl.cumsum(is_chosen.to(tl.int32))
    place = tl.where(is_chosen, until - 1, size - 1 - (row - until))
    tl.store(index_ptr + place, row, mask=row < size)
    if block == tl.num_programs(0) - 1:
        count = before + tl.sum(is_chosen.to(tl.int32))
        tl.store(count_ptr, count)
        if STEP:
            body = tl.cdiv(count, STEP) - 1
            if handle != 0:
                set_conditional(handle, body)


def compact(
    mask: Tensor, *, switch: Switch | None = None, config: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Where ``mask [N]``, bool or integer, is true: ``index [N]`` and ``count [1]``, int32.

    The first ``count`` indices ascend; the others follow in no particular order. ``switch``: the
    SWITCH node whose body the count selects.
    """
    assert mask.is_contiguous()
    size = len(mask)
    options = dict(config or tuning.config_for("compact", mask.device, size))
    block = options.pop("BLOCK")
    index = empty((size,), torch.int32, mask.device)
    count = empty((1,), torch.int32, mask.device)
    launch(
        _compact_kernel,
        # Even an empty mask needs its count written.
        (max(1, triton.cdiv(size, block)),),
        options,
        mask_ptr=mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        index_ptr=index,
        count_ptr=count,
        size=size,
        handle=0 if switch is None else signed(switch.handle),
        STEP=0 if switch is None else switch.step,
        BLOCK=block,
    )
    return index, count


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing: up to 32 elements per thread."""
    return [
        {"BLOCK": block, "num_warps": warps}
        for block in (1024, 2048, 4096, 8192)
        for warps in (4, 8, 16)
        if block // (32 * warps) <= 32
    ]
