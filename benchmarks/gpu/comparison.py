"""Each operation by our kernels and by plain torch (cuBLAS, SDPA), against its floor.

torch computes only the products or the attention: the norms, RoPE, stores and residual adds that
the kernels fuse are left out on its side. Kernels that still win are faster outright.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.half_works import DECODE_HALVED
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Maker, Widths
from benchmarks.gpu.prefill_works import PREFILL
from benchmarks.gpu.results import Values
from benchmarks.gpu.timing import copies, seconds
from benchmarks.gpu.works import DECODE, DECODE_ARRANGED, WorkMaker, compile_works, on_own_memory
from fastskip.kernels.launch import recording

ROW_COUNTS = (16, 64, 128, 256, 576, 640, 1280)
"""Row counts of products: the table of products shows where cuBLAS overtakes the kernels."""


def compare(setting: Setting, widths: Widths, rows: int) -> Values:
    """Times all operations; ``rows`` 0 stands for the rows of a prompt."""
    widths = TINY if setting.is_tiny else widths
    works = DECODE | DECODE_ARRANGED | DECODE_HALVED if rows else PREFILL
    rows = rows or widths.context
    compile_works(works.values(), widths, rows, setting.dtype, setting.device)
    found = {}
    for name, maker in works.items():
        try:
            found[name] = _times(setting, widths, maker, rows)
        except Exception as error:
            if is_lost(setting.device):
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        if setting.seconds_left < 0:
            break
    if all("error" in times for times in found.values()):
        raise RuntimeError(str(found))
    return {"widths": widths.name, "rows": rows, "works": found}


def products(setting: Setting, widths: Widths) -> Values:
    """cuBLAS at the four products of a layer, by rows: microseconds and share of the floor."""
    widths = TINY if setting.is_tiny else widths
    make = Maker(widths, setting.dtype, setting.device)
    ceilings = ceilings_of(setting)
    attention = widths.heads * widths.head_dim
    both = 2 * widths.groups * widths.head_dim
    shapes = {
        "qkv": (attention + both, widths.hidden),
        "output": (widths.hidden, attention),
        "gate and up": (2 * widths.ffn, widths.hidden),
        "down": (widths.hidden, widths.ffn),
    }
    found: dict[str, Any] = {}
    for name, (n_out, n_in) in shapes.items():
        nbytes = n_out * n_in * setting.dtype.itemsize
        count = copies(nbytes, setting.device)
        weights = [make.linear(n_out, n_in).weight for _ in range(count)]
        for rows in (2,) if setting.is_tiny else ROW_COUNTS:
            x = make.noise(rows, n_in)
            time = seconds([partial(F.linear, x, weight) for weight in weights], setting.device)
            floor = max(
                nbytes / ceilings.bandwidth_bytes_per_s,
                2 * rows * n_in * n_out / ceilings.flops_per_s,
            )
            found[f"{name}, {rows} rows"] = {"us": 1e6 * time, "share_of_floor": floor / time}
    return {"widths": widths.name, "cublas": found}


def flash(setting: Setting, widths: Widths) -> Values:
    """flash-attn at a prompt and at one decode step, where it is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return {"note": "flash-attn is not installed"}
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    make = Maker(widths, torch.bfloat16, setting.device)
    found = {}
    for rows in (widths.context, 1):
        q = make.noise(1, rows, widths.heads, widths.head_dim)
        k, v = make.noise(2, 1, widths.context, widths.groups, widths.head_dim)
        time = seconds([partial(flash_attn_func, q, k, v, causal=True)], setting.device)
        found[f"{rows} rows"] = {"us": 1e6 * time}
    return {"widths": widths.name, "flash_attn": found}


def _times(setting: Setting, widths: Widths, maker: WorkMaker, rows: int) -> dict[str, Any]:
    from fastskip.ops import compiled

    device = setting.device
    works = on_own_memory(maker, widths, rows, setting)
    first = works[0]
    with recording() as account:
        first.run(compiled)
    ours = seconds([partial(work.run, compiled) for work in works], device)
    rivals = [work.rival for work in works if work.rival is not None]
    other = seconds(rivals, device) if rivals else None
    floor = first.floor_seconds(ceilings_of(setting))
    return {
        "us": 1e6 * ours,
        "torch_us": None if other is None else 1e6 * other,
        "floor_us": 1e6 * floor,
        "share_of_floor": floor / ours,
        "torch_share_of_floor": None if other is None else floor / other,
        "gb_per_s": first.nbytes / ours / 1e9,
        "launches": {name: count for name, (count, _) in account.by_kernel().items()},
    }


def _cell(widths: Widths, rows: int) -> Cell:
    name = f"kernels.{widths.name}.{f'b{rows}' if rows else 'prefill'}"
    what = f"decode at batch {rows}" if rows else "prefill"
    about = f"operations of {widths.name.upper()} {what} against plain torch and the floor"
    return Cell(name, about, 1.5, partial(compare, widths=widths, rows=rows))


CELLS = [
    *(_cell(widths, rows) for widths in (SEVEN, THIRTEEN) for rows in (1, 4, 16, 64, 0)),
    Cell("kernels.7b.cublas", "cuBLAS by row count", 1, partial(products, widths=SEVEN)),
    Cell("kernels.7b.flash", "flash-attn, where installed", 0.5, partial(flash, widths=SEVEN)),
]
