"""Prompt attention by the flash-attn package (versions 2, 3 and 4), on request.

It computes plain causal attention of packed sequences, so it serves prompts on an empty cache,
under plans where exactly the rows that attend hold entries. Decode steps, later turns and the few
rows that continue in the last layer stay with fastskip's own kernels, which read the cache in
place.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastskip.ops.allocate import to_device
from fastskip.ops.contracts import Pages, Reach
from fastskip.ops.operations import FusedOperations

# Modules that provide ``flash_attn_varlen_func``, newest version first.
MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}
HALVES = (torch.bfloat16, torch.float16)


def load_flash(dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """The newest installed flash-attn's function for packed sequences.

    Raises:
        ValueError: flash-attn is not installed, or cannot run on this device and dtype.
    """
    if device.type != "cuda" or dtype not in HALVES:
        raise ValueError(
            f"attention: 'flash' on {device} in {dtype}; flash-attn needs CUDA, and bfloat16 or "
            "float16; allowed here: None (fastskip's own kernels)"
        )
    for module in MODULES.values():
        if _is_installed(module):
            found: Callable[..., Any] = import_module(module).flash_attn_varlen_func
            return found
    raise ValueError(
        "attention: 'flash' needs flash-attn (pip install 'fastskip[flash]'); allowed here: None "
        "(fastskip's own kernels)"
    )


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


def attend_packed(
    flash: Callable[..., Any],
    ops: FusedOperations,
    queries: Tensor,
    reach: Reach,
    pages: Pages,
    scale: float,
) -> Tensor:
    """``ops.attend_rows`` by flash-attn, for a reach that ``is_whole``.

    ``queries [n, H, K]`` -> ``[n, H * K]``. Entries are first copied into dense tensors: the
    package has its own page layouts.
    """
    bounds, device = torch.tensor(reach.bounds.host, dtype=torch.int32), queries.device
    lengths = bounds.diff()
    sequences = torch.repeat_interleave(lengths).to(torch.int32)
    slots = torch.arange(len(sequences), dtype=torch.int32) - bounds[sequences]
    there = to_device(sequences, device), to_device(slots, device)
    keys, values = ops.read_entries(pages, *there)
    order, sums, longest = reach.order.long(), reach.bounds.device, int(lengths.max())
    found = flash(
        queries[order],
        keys,
        values,
        cu_seqlens_q=sums,
        cu_seqlens_k=sums,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
    )
    # Some versions return the log-sum-exp too.
    mixed: Tensor = found[0] if isinstance(found, tuple) else found
    out = torch.empty_like(queries)
    out[order] = mixed
    return out.flatten(1)
