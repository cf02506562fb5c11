"""The measured ceilings of this machine, on which floors and shares of the ideal are based.

A measurement takes a second or two and is cached in the user's cache directory. Thread counts are
read, never changed.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from fastskip.json_file import write_json
from fastskip.ops import processor
from fastskip.plan.costs import Ceilings
from fastskip.wording import dtype_name

_log = logging.getLogger(__name__)

BUFFER_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}  # several times the largest caches
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
LONG_ENOUGH_S = 0.1
RUNS = 5


def ceilings(
    dtype: torch.dtype, device: torch.device | str = "cpu", *, refresh: bool = False
) -> Ceilings:
    """The cached ceilings of this machine for `dtype` on `device`, measured if there are none.

    They are cached by `machine_key` in `ceilings.json` under `$XDG_CACHE_HOME/fastskip` (default
    `~/.cache/fastskip`). `refresh` measures again.
    """
    device = torch.device(device)
    path = cache_file()
    kept = _read(path)
    key = machine_key(dtype, device)
    entry = None if refresh else _entry(kept.get(key))
    if entry is None:
        entry = measure_ceilings(dtype, device)
        _write(path, kept | {key: asdict(entry)})
    return entry


def measure_ceilings(dtype: torch.dtype, device: torch.device | str = "cpu") -> Ceilings:
    """Measure memory bandwidth (bytes/s) and the matrix multiplication rate (FLOP/s) now.

    Bandwidth is the best of a sum, a matrix-vector product and a copy (reads and writes counted)
    over a buffer much larger than the caches; the rate is that of the fastest square GEMM. Each is
    the median of several runs.
    """
    device = torch.device(device)
    if device.type not in BUFFER_BYTES:
        raise ValueError(f"device={device}; allowed: {', '.join(BUFFER_BYTES)}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}; allowed: a floating point dtype")
    with torch.inference_mode():
        return Ceilings(_bandwidth(dtype, device), _flop_rate(dtype, device))


def machine_key(dtype: torch.dtype, device: torch.device) -> str:
    """The processor, its threads or TF32 setting, dtype and torch version of a measurement."""
    name = device_name(device)
    if device.type == "cuda":
        tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        setting = "tf32" if tf32 else ""
    else:
        setting = f"{torch.get_num_threads()} threads"
    parts = (name, setting, dtype_name(dtype), f"torch {torch.__version__}")
    return ", ".join(part for part in parts if part)


def device_name(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.described("model name") or platform.machine()


def cache_file() -> Path:
    """Where ceilings are cached."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fastskip" / "ceilings.json"


def _bandwidth(dtype: torch.dtype, device: torch.device) -> float:
    columns = 4096
    rows = BUFFER_BYTES[device.type] // (columns * dtype.itemsize)
    matrix = torch.ones(rows, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    words = matrix.view(-1).view(torch.float32)
    front, back = matrix.view(-1).chunk(2)
    ways = (lambda: words.sum(), lambda: matrix @ vector, lambda: back.copy_(front))
    return matrix.nbytes / min(_seconds(way, device) for way in ways)


def _flop_rate(dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    noise = torch.Generator(device).manual_seed(0)  # constants draw less power, so run too fast
    for size in MATRIX_SIZES[device.type]:
        a = torch.randn(size, size, dtype=dtype, device=device, generator=noise)
        out = torch.empty_like(a)
        seconds = _seconds(lambda a=a, out=out: torch.mm(a, a, out=out), device)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_ENOUGH_S:  # a slow dtype: the next size would take eight times as long
            break
    return best


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one run; on a GPU several runs share one synchronisation."""
    repeats = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(1 + RUNS):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times[1:])


def _read(path: Path) -> dict[str, object]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s cannot be read, so ceilings are measured again: %s", path, error)
        return {}
    return kept if isinstance(kept, dict) else {}


def _entry(value: object) -> Ceilings | None:
    """A cached measurement, or None if it is incomplete or invalid."""
    if not isinstance(value, dict) or set(value) != {"bandwidth_bytes_per_s", "flops_per_s"}:
        return None
    numbers = [v for v in value.values() if isinstance(v, float) and 0 < v < float("inf")]
    return Ceilings(**value) if len(numbers) == len(value) else None


def _write(path: Path, kept: dict[str, object]) -> None:
    try:
        write_json(path, kept, indent=2)
    except OSError as error:
        _log.warning("ceilings cannot be cached: %s", error)
