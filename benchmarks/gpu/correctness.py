"""Are the compiled kernels correct? Checked on the GPU, because the interpreter cannot tell.

``kernels``: the kernel tests, compiled. ``ops``: every operation at real shapes against fp64.
``models``: small models end to end against Hugging Face. ``sanitizer``: NVIDIA's memory checker.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gate import faults
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.half_works import DECODE_HALVED
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Maker, Widths
from benchmarks.gpu.models import policies, tiny_model
from benchmarks.gpu.prefill_works import PREFILL
from benchmarks.gpu.results import ROOT, Values, without_places
from benchmarks.gpu.routed_works import DECODE_ROUTED, PREFILL_ROUTED
from benchmarks.gpu.works import DECODE, DECODE_ARRANGED, WorkMaker, compile_works
from benchmarks.shapes import Shape, models, prompts
from fastskip.ops import fused
from fastskip.verification.budget import Budget, measure
from fastskip.wording import dtype_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEW_TESTS = ("tests/kernels/test_compaction.py", "--maxfail=1")
# The ignored ones need no device, but a probe for every table entry, and new entries may lack one.
TESTS = (
    *("tests/kernels", "--maxfail=40"),
    *(f"--ignore=tests/kernels/test_{name}.py" for name in ("compilation", "tuning")),
)

Case = tuple[str, WorkMaker, int]
"""An operation by name, and with how many rows it is checked."""


class Wrong(RuntimeError):
    """A result is less accurate than plain low-precision code, or differs where it must not."""


def kernel_tests(setting: Setting) -> Values:
    """tests/kernels with compiled kernels; the log is kept beside the results."""
    if importlib.util.find_spec("pytest") is None:
        return {"note": "pytest is not installed"}
    what = FEW_TESTS if setting.is_tiny else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider"]
    if not setting.is_tiny and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    log = setting.folder / "kernel-tests.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    limit = 1.5 * max(60.0, setting.seconds_left)
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [*command, *what], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            done = None
    log.write_text(without_places(log.read_text(errors="replace")))
    tail = log.read_text().splitlines()[-60:]
    last = tail[-1] if tail else ""
    if done is None:
        raise Wrong("\n".join([*tail[-20:], f"not finished after {limit:.0f} s; see {log.name}"]))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if done.returncode:
        raise Wrong("\n".join([*tail, f"kernel tests: {last}"]))
    return {"counts": counts, "summary": last}


def operations(setting: Setting, widths: Widths, dtype: torch.dtype) -> Values:
    """Every operation, by kernels and by torch in the same dtype, against fp64."""
    from fastskip.ops import compiled

    widths = TINY if setting.is_tiny else widths
    found: dict[str, Any] = {}
    wrong = []
    for name, maker, rows in _wanted(setting, widths, dtype):
        try:
            worst = worst_output(compiled, maker, widths, rows, dtype, setting.device)
        except Exception as error:
            if is_lost(setting.device):
                raise
            worst = {"error": f"{type(error).__name__}: {error}"}
        found[f"{name}, {rows} rows"] = worst
        if "error" in worst or worst["share_of_allowed"] > 1:
            wrong.append(f"{name}, {rows} rows: {worst}")
        if setting.seconds_left < 0:
            wrong.append(f"not finished: time ran out after {name}, {rows} rows")
            break
    if wrong:
        raise Wrong("\n".join(wrong))
    return {"widths": widths.name, "errors": found}


def _wanted(setting: Setting, widths: Widths, dtype: torch.dtype) -> list[Case]:
    """The cases that are checked, compiled."""
    wanted = list(cases(widths))
    if setting.is_tiny:  # prompts in one dtype are enough, and slow in the interpreter
        counts = (1, widths.context) if dtype == setting.dtype else (1,)
        wanted = [case for case in wanted if case[2] in counts]
    for count in dict.fromkeys(rows for _, _, rows in wanted):
        makers = [maker for _, maker, rows in wanted if rows == count]
        compile_works(makers, widths, count, dtype, setting.device)
    return wanted


def end_to_end(setting: Setting, dtype: torch.dtype) -> Values:
    """A small model under many policies against the masked Hugging Face model, and its tokens."""
    build = partial(tiny_model, device=setting.device.type)
    both = models(build, dtype, setting.device.type, setting.impl)
    names = ("dense", "half_blocks") if setting.is_tiny else None
    wanted = policies(both.depth, names)
    found = faults(both, wanted)
    if found:
        raise Wrong("\n".join(f"{name}: {fault}" for name, fault in found.items()))
    values: dict[str, Any] = {"policies": list(wanted)}
    if dtype == torch.float32:
        import fastskip

        inputs = prompts(both.hf, Shape("tiny", build, 2, 6), 2)
        options = {"max_new_tokens": 16, "do_sample": False}
        fastskip.set_policy(both.ours, "dense")
        a, b = (model.generate(**inputs, **options) for model in (both.hf, both.ours))
        if not torch.equal(a, b):
            raise Wrong(
                f"fp32 greedy tokens differ from Hugging Face's:\n{a.tolist()}\n{b.tolist()}"
            )
        values["tokens"] = "equal to Hugging Face's"
    return values


def sanitizer(setting: Setting) -> Values:
    """compute-sanitizer over small calls of every operation: accesses, then races."""
    tool = shutil.which("compute-sanitizer")
    if setting.is_tiny or tool is None:
        return {"note": "compute-sanitizer is not on the path" if tool is None else "no device"}
    found = {}
    # Separate allocations, so that out-of-bounds accesses are detected.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable]
        command += ["-m", "benchmarks.gpu.once", "tiny", "2"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        log = setting.folder / f"sanitizer-{check}.log"
        log.write_text(without_places(done.stdout + done.stderr))
        if done.returncode:
            raise Wrong(f"{check}:\n{tail}")
        found[check] = tail.splitlines()[-1] if tail else ""
    return found


def cases(widths: Widths) -> Iterator[Case]:
    """All that is checked at these widths."""
    for rows in (1, 3, 16, 64):
        for name, maker in DECODE.items():
            yield name, maker, rows
    for rows in (1, 16):
        for name, maker in (DECODE_ARRANGED | DECODE_HALVED | DECODE_ROUTED).items():
            yield name, maker, rows
    for name, maker in (PREFILL | PREFILL_ROUTED).items():
        yield name, maker, widths.context


def worst_output(
    ops: Any,
    maker: WorkMaker,
    widths: Widths,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """The worst output of one operation: its error, and that as a share of the allowed one."""
    # Integers are compared in fp64 too; ties between maxima have a fixed order.
    results = []
    for implementation, own in ((ops, dtype), (fused, dtype), (fused, torch.float64)):
        work = maker(Maker(widths, own, device), rows)
        outputs = work.run(implementation)
        results.append([x.clone() for x in (*outputs, *work.entries())])
    worst: dict[str, Any] = {"share_of_allowed": 0.0}
    for actual, eager, truth in zip(*results, strict=True):
        if not actual.is_floating_point():
            actual, eager, truth = (x.double() for x in (actual, eager, truth))
        budget = measure("", actual, eager, truth)
        share = _share(budget)
        if share >= worst["share_of_allowed"]:
            worst = {
                "share_of_allowed": share,
                "absolute": budget.error,
                "eager": budget.eager_error,
            }
    return worst


def _share(budget: Budget) -> float:
    """The error as a share of the allowed one; infinite where that is 0, or no number because plain
    code fails too."""
    if budget.error == 0 and budget.holds:
        return 0.0
    return budget.error / budget.allowed if 0 < budget.allowed < math.inf else math.inf


def _operations(widths: Widths, dtype: torch.dtype, is_default: bool) -> Cell:
    short = dtype_name(dtype)
    name = f"correctness.ops.{widths.name}.{short}"
    about = f"every operation at {widths.name.upper()} shapes in {short} against fp64"
    return Cell(name, about, 0.8, partial(operations, widths=widths, dtype=dtype), is_default)


def _end_to_end(dtype: torch.dtype) -> Cell:
    short = dtype_name(dtype)
    about = f"a small model in {short} against Hugging Face"
    return Cell(f"correctness.models.{short}", about, 0.4, partial(end_to_end, dtype=dtype), True)


CELLS = [
    *(_end_to_end(dtype) for dtype in DTYPES),
    *(_operations(SEVEN, dtype, True) for dtype in DTYPES),
    Cell("correctness.kernels", "the kernel tests, compiled", 1.9, kernel_tests, True),
    *(_operations(THIRTEEN, dtype, False) for dtype in DTYPES),
    Cell("correctness.sanitizer", "NVIDIA's memory checker over small calls", 5, sanitizer),
]
