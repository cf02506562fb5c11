"""Where decode steps and a prefill spend their time: kernels by time, with their bandwidth."""

from __future__ import annotations

import csv
import io
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

import fastskip
from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Widths
from benchmarks.gpu.models import load, policies, shape
from benchmarks.gpu.results import ROOT, Values, without_places
from benchmarks.gpu.timing import synchronize
from benchmarks.shapes import prompts
from fastskip.kernels.launch import Account, recording
from fastskip.kernels.products import Weights
from fastskip.profiling import ranges

N_NEW = 16
TOP = 15


def profile(setting: Setting, widths: Widths, batch: int, policy: str) -> Values:
    """torch's profiler over a prefill and the decode steps after it, under one policy."""
    widths = TINY if setting.is_tiny else widths
    device = setting.device.type
    both = load(widths, setting.dtype, device, setting.impl)
    model = fastskip.set_policy(both.ours, policies(both.depth, [policy])[policy])
    inputs = prompts(both.hf, shape(widths, device), min(batch, 2) if setting.is_tiny else batch)
    n_new = 3 if setting.is_tiny else N_NEW

    def generate(count: int) -> None:
        model.generate(**inputs, max_new_tokens=count, do_sample=False)

    with recording() as account:  # graphs are captured now
        generate(n_new)
        generate(1)
    whole, first = (
        _kernels(partial(generate, n_new), device),
        _kernels(partial(generate, 1), device),
    )
    steps = n_new - 1
    decode = {}
    for name, (count, us) in whole.items():
        count_first, us_first = first.get(name, (0, 0.0))
        # Launches beyond those of the first token belong to the steps.
        if count > count_first:
            decode[name] = ((count - count_first) / steps, max(us - us_first, 0.0) / steps)
    plan = fastskip.plan_of(model)
    sizes = widths.n_image, widths.n_text, n_new, len(inputs["input_ids"])
    step = plan.cost(*sizes).decode
    total = sum(us for _, us in decode.values())
    nbytes = step.bytes / step.steps
    ceiling = ceilings_of(setting).bandwidth_bytes_per_s
    return {
        "widths": widths.name,
        "batch": sizes[-1],
        "policy": policy,
        "decode_us_per_step": total,
        "decode_gb_per_s": nbytes / total / 1e3 if total else None,
        "decode_share_of_bandwidth": nbytes / total * 1e6 / ceiling if total else None,
        "spans": _spans(partial(generate, 3), device),
        "decode_kernels": _top(decode, weight_bytes(account)),
        "prefill_kernels": _top(first),
    }


def nsight_compute(setting: Setting, widths: Widths, rows: int) -> Values:
    """Nsight Compute over one call of each operation: memory throughput as a share of its peak."""
    tool = shutil.which("ncu")
    if setting.is_tiny or tool is None:
        return {"note": "ncu is not on the path" if tool is None else "no device"}
    command = [tool, "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["--section", "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy"]
    command += ["--kernel-name", r"regex:^_.*_kernel$", sys.executable]
    command += ["-m", "benchmarks.gpu.once", widths.name, str(rows)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ
    )
    (setting.folder / f"ncu-{widths.name}-b{rows}.csv").write_text(without_places(done.stdout))
    found = _ncu_rows(done.stdout)
    if not found:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return {"widths": widths.name, "rows": rows, "kernels": found}


def _kernels(run: Any, device: str) -> dict[str, tuple[int, float]]:
    """Name -> (launches, microseconds) of device kernels; of torch operators on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in profiler.key_averages():
        us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if us > 0:
            count, before = found[event.key]
            found[event.key] = count + event.count, before + us
    return dict(found)


def _spans(run: Any, device: str) -> dict[str, float]:
    """Time in ranges named by the package, relative to the longest: device time, or CPU time on a
    CPU.

    Decode steps run kernel by kernel within them; layers are summed.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with ranges(), torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(torch.device(device))
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False) and event.device_type == DeviceType.CPU:
            name = "layers" if event.key.startswith("layer ") else event.key
            found[name] += event.device_time_total if device == "cuda" else event.cpu_time_total
    most = max(found.values(), default=1.0) or 1.0
    return {name: us / most for name, us in found.items()}


def weight_bytes(account: Account) -> dict[str, float]:
    """Mean bytes of weights that a launch of each kernel reads, over the recorded launches."""
    found: dict[str, list[int]] = defaultdict(list)
    for launch in account.launches:
        weights = list(_matrices(tuple(launch.arguments.values())))
        if launch.kernel is None or not weights:
            continue
        # One launch may hold several equal problems.
        problems = launch.arguments.get("PARTS", (*launch.grid, 1, 1)[2])
        nbytes = problems * sum(weight.nbytes for weight in weights)
        if (
            "weight_distance" in launch.arguments
        ):  # a parallel block: the FFN's weights follow these
            rows = launch.arguments["F"] * (1 + launch.arguments["IS_GATED"])
            nbytes += rows * weights[0].shape[1] * weights[0].element_size()
        found[launch.kernel.__name__].append(nbytes)
    return {name: statistics.mean(each) for name, each in found.items()}


def _matrices(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """The weights among a launch's arguments, which hold them in tuples."""
    for each in arguments:
        if isinstance(each, Weights):
            # A second problem is given only as a distance.
            yield from [each.weight] if isinstance(each.weight, Tensor) else []
        elif isinstance(each, tuple):
            yield from _matrices(each)


def _top(
    kernels: Mapping[str, tuple[float, float]], nbytes_of: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    total = sum(us for _, us in kernels.values()) or 1.0
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP]
    found = []
    for name, (count, us) in ordered:
        nbytes = (nbytes_of or {}).get(name)
        rate = None if nbytes is None else nbytes * count / us / 1e3
        numbers = {"launches": count, "us": us, "share": us / total, "gb_per_s": rate}
        found.append({"kernel": name[:80], **numbers})
    return found


def _ncu_rows(text: str) -> list[dict[str, Any]]:
    """The last launch of each kernel and grid; ncu prints two header lines, names and units."""
    start = text.find('"ID"')
    if start < 0:
        return []
    wanted = {
        "gpu__time_duration.sum": "duration",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor_percent",
        "launch__registers_per_thread": "registers",
        "launch__occupancy_limit_shared_mem": "blocks_by_shared_memory",
        "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    }
    head, units, *rows = csv.reader(io.StringIO(text[start:]))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        record = dict(zip(head, row, strict=False))
        own: dict[str, Any] = {"kernel": record["Kernel Name"], "grid": record.get("Grid Size")}
        for column, name in wanted.items():
            if column in record:
                unit = units[head.index(column)]
                own[name] = f"{record[column]} {unit}".strip()
        found[own["kernel"], str(own["grid"])] = own
    return list(found.values())


def _cell(widths: Widths, batch: int, policy: str, is_default: bool = False) -> Cell:
    about = f"kernels by time: {widths.name.upper()}, batch {batch}, {policy}"
    run = partial(profile, widths=widths, batch=batch, policy=policy)
    return Cell(f"profile.{widths.name}.b{batch}.{policy}", about, 1.0, run, is_default)


CELLS = [
    _cell(SEVEN, 1, "dense", True),
    _cell(SEVEN, 16, "dense"),
    _cell(SEVEN, 1, "half_blocks"),
    _cell(SEVEN, 1, "parallel_blocks"),
    _cell(SEVEN, 1, "block_pairs"),
    _cell(THIRTEEN, 1, "dense"),
    *(
        Cell(
            f"profile.ncu.7b.b{rows}",
            f"Nsight Compute over the operations of 7B at batch {rows}",
            5,
            partial(nsight_compute, widths=SEVEN, rows=rows),
        )
        for rows in (1, 16)
    ),
]
