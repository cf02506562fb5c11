"""A measurement as plain data, for `extra_info`, the results file and the tables."""

from __future__ import annotations

import platform
import subprocess
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastskip
from benchmarks.floors import Work, work_of
from benchmarks.harness import Measurement
from benchmarks.peers import DENSE, HF
from benchmarks.runs import median
from benchmarks.shapes import models
from fastskip import machine
from fastskip.plan.costs import Ceilings
from fastskip.timing import threads_set
from fastskip.wording import dtype_name

Record = dict[str, Any]


def record(measured: Measurement, peer: str, group: str) -> Record:
    """Everything about one peer in one group; keys that do not apply hold None."""
    case, shape = measured.case, measured.case.shape
    images, texts = _rows(measured)
    own, plan = next(p for p in case.peers if p.name == peer), measured.plans[peer]
    is_ours = own.policy is not None
    hf = models(shape.build, case.dtype, "cpu").hf
    threads, runs = measured.best(peer, group)
    seconds = median(runs, group)
    found = ceilings(case.dtype, threads)
    flops, floor = _work(peer, measured, found)[group]
    _, dense_floor = _work(DENSE.name, measured, found)[group]
    vs_dense = measured.seconds(DENSE.name, group) / seconds
    # Arrangements save launches, which no floor counts; vision has no floor.
    has_ideal = is_ours and group != "e2e" and not plan.policy.arrangements
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "case": case.name,
        "group": group,
        "peer": peer,
        "label": own.label,
        "subject": case.subject,
        "skip_rates": measured.rates.get(peer),
        "model": shape.name,
        "weights": "trained" if hf.name_or_path else "random",
        "policy_id": plan.policy.name if is_ours else None,
        "policy_hash": plan.fingerprint[:16] if is_ours else None,
        "batch": case.batch,
        "n_text": texts if case.mix else shape.n_text,
        "n_visual": images if case.mix else measured.n_visual,
        "n_new": case.n_new,
        "threads": threads,
        "median_ms": 1e3 * seconds,
        "samples_ms": [1e3 * float(getattr(run, group)) for run in runs],
        "ttft_ms": 1e3 * median(runs, "ttft"),
        "tpot_ms": 1e3 * median(runs, "decode"),
        "tokens_per_s": case.batch * case.n_new / median(runs, "e2e"),
        "kv_bytes": sum(map(partial(plan.kv_bytes, n_generated=case.n_new - 1), images, texts)),
        "peak_bytes": max(peaks, default=None),
        "tflops": flops / seconds / 1e12,
        "speedup_vs_dense": vs_dense,
        "speedup_vs_hf": measured.seconds(HF.name, group) / seconds,
        "floor_ms": 1e3 * floor,
        "ideal_speedup": dense_floor / floor if has_ideal else None,
        "share_of_ideal": vs_dense * floor / dense_floor if has_ideal else None,
        "bandwidth_gb_per_s": found.bandwidth_bytes_per_s / 1e9,
        "gflop_per_s": found.flops_per_s / 1e9,
        "attn_impl": "fastskip" if is_ours else hf.config._attn_implementation,
        "dtype": dtype_name(case.dtype),
        **environment("cpu"),
    }


def _work(peer: str, measured: Measurement, found: Ceilings) -> dict[str, Work]:
    """The work of each group; of a peer with routers, as expected at the rates at which its rows
    actually skipped."""
    return work_of(
        measured.plans[peer],
        list(zip(*_rows(measured), strict=True)),
        measured.case.n_new,
        found,
        text_before=measured.case.shape.text_before,
        rates=measured.rates.get(peer, (None, None)),
    )


def _rows(measured: Measurement) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Image and text rows of each sequence."""
    case = measured.case
    if case.mix is None:
        return (measured.n_visual,) * case.batch, (case.shape.n_text,) * case.batch
    hf = models(case.shape.build, case.dtype, "cpu").hf
    return case.mix.image_rows(hf), case.mix.text_rows(case.shape)


@cache
def ceilings(dtype: torch.dtype, threads: int) -> Ceilings:
    """The ceilings that the machine reaches in this run, measured once per setting."""
    with threads_set(threads):
        return machine.measure_ceilings(dtype)


@cache
def environment(device: str) -> dict[str, str | None]:
    """The device, the software versions and the commit."""
    return {
        "device": machine.device_name(torch.device(device)),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "fastskip": fastskip.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def file_name(device: str) -> str:
    """A results file name for this machine, such as `some-cpu-2-threads.json`."""
    name = machine.device_name(torch.device(device))
    if device == "cpu":
        name += f" {torch.get_num_threads()} threads"
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return "-".join(words) + ".json"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, marked if the working tree is dirty."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
