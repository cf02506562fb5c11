"""What the GPU reaches: bytes and FLOPs per second, and what a CUDA graph node costs."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import nodes
from benchmarks.gpu.cells import Cell, Setting
from benchmarks.gpu.results import Values
from benchmarks.gpu.timing import seconds
from fastskip.plan.costs import Ceilings

MEMORY, MATRIX = "ceilings.memory", "ceilings.matrix"
BUFFER_BYTES = 4 << 30
SIZES = (4096, 8192)


def memory(setting: Setting) -> Values:
    """GB/s of a copy (bytes read and written), of torch's sum and of a kernel that only reads."""
    size = (1 << 20) if setting.is_tiny else BUFFER_BYTES
    source = torch.randn(size // 4, device=setting.device)
    target = torch.empty_like(source)
    found: dict[str, float] = {}
    found["copy"] = 2 * size / _seconds(lambda: target.copy_(source), setting)
    found["sum"] = size / _seconds(lambda: source.sum(), setting)
    for programs in (1, 2, 3):
        many = 4 if setting.is_tiny else programs * _processors(setting)
        run = nodes.reader(source, many)
        found[f"read by {programs} programs a multiprocessor"] = size / _seconds(run, setting)
    rates = {name: rate / 1e9 for name, rate in found.items()}
    return {"gb_per_s": rates, "best_gb_per_s": max(rates.values())}


def matrix(setting: Setting) -> Values:
    """TFLOP/s of matrix products of random numbers (zeros draw less power and run faster)."""
    found = {}
    for size in (64,) if setting.is_tiny else SIZES:
        a, b = (_random(size, size, setting) for _ in range(2))
        out = torch.empty_like(a)
        time = _seconds(partial(torch.mm, a, b, out=out), setting)
        found[str(size)] = 2 * size**3 / time / 1e12
    return {"tflop_per_s": found, "best_tflop_per_s": max(found.values())}


@cache
def ceilings_of(setting: Setting) -> Ceilings:
    """The measured ceilings; if the results file has none, measured once per cell, so that all its
    results refer to the same ones. That takes gigabytes: call it before filling the memory."""
    lines = setting.results
    bandwidth = (lines.values(MEMORY) or memory(setting))["best_gb_per_s"]
    rate = (lines.values(MATRIX) or matrix(setting))["best_tflop_per_s"]
    return Ceilings(1e9 * bandwidth, 1e12 * rate)


def _seconds(run: Any, setting: Setting) -> float:
    return seconds([run], setting.device)


def _random(rows: int, columns: int, setting: Setting) -> Tensor:
    return torch.randn(rows, columns, device=setting.device).to(setting.dtype)


def _processors(setting: Setting) -> int:
    count: int = torch.cuda.get_device_properties(setting.device).multi_processor_count
    return count


CELLS = [
    Cell(MEMORY, "bandwidth of copies and reads", 0.1, memory, True),
    Cell(MATRIX, "rate of bf16 matrix products", 0.1, matrix, True),
    Cell("ceilings.nodes", "empty, early-exit and conditional graph nodes", 0.2, nodes.cost, True),
]
