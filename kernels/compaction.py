"""From a mask to the rows it chooses, without a word to the host.

    index[: count] = the numbers of the true elements of mask, ascending
    index[count :] = those of the others
    body of the SWITCH node ``handle`` = ceil(count / STEP) - 1, none for a count of 0

``mask [N]`` -> ``index [N]``, ``count [1]``, int32. Grid ``(N / BLOCK,)``: a program counts what is
chosen before its block, then places its own. Reading the mask again is cheaper than a second launch
as long as it lies in the L2 cache, and it needs neither scratch nor an order of the programs: the
others are placed from the end. Tables: kernel ``compact``, shape ``()``.
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
    # Blocks before this one are whole. One sum at the end instead of one a block.
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

    The first ``count`` numbers of ``index`` ascend; behind them are the others, in no order.
    ``switch``: the SWITCH node whose body is chosen by the count.
    """
    assert mask.is_contiguous()
    size = len(mask)
    options = dict(config or tuning.config_for("compact", mask.device, size))
    block = options.pop("BLOCK")
    index = empty((size,), torch.int32, mask.device)
    count = empty((1,), torch.int32, mask.device)
    launch(
        _compact_kernel,
        # No rows have a count too.
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
    """Configurations worth timing: up to 32 elements in a thread."""
    return [
        {"BLOCK": block, "num_warps": warps}
        for block in (1024, 2048, 4096, 8192)
        for warps in (4, 8, 16)
        if block // (32 * warps) <= 32
    ]
