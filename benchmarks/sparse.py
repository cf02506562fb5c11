"""Products of few rows with a pruned weight held dense, as bitmap and values, or as CSR.

    pytest benchmarks/test_sparse.py --benchmark-only
    python -m benchmarks.sparse [--device cuda] [--models] [--save]

Each case is one randomly pruned weight and one row count. All forms multiply the same rows
round-robin, so that other load on the machine slows them all alike; medians are compared. A form
is timed only if its product is within the error budget of a plain sum. On a CPU the matrix is
fp32, the dtype that CSR runs in; on CUDA it is bf16, and the bitmap's kernel is the only other
form. Caches are not flushed between rounds: they hold much of the smaller shape.

``--models`` also times whole ``generate`` calls of the ``0.5b`` shape with random weights, pruned
by magnitude, at batch 1 on the CPU: dense (our fast path, with merged projections) against CSR.
Both must generate the same tokens.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records import environment, file_name
from benchmarks.runs import Run, median, run_once
from benchmarks.shapes import HALF_BILLION, models, prompts
from fastskip.json_file import write_json
from fastskip.sparse.convert import compress_
from fastskip.sparse.linear import BitmapLinear, CsrLinear, Weights
from fastskip.study.pruning import Recipe, prune_
from fastskip.timing import rotated
from fastskip.verification.budget import measure as budget
from fastskip.wording import dtype_name

SHAPES = ((2816, 1024), (11008, 4096))
RATIOS = (0.5, 0.7, 0.9)
ROWS = {"cpu": (1, 4, 16), "cuda": (1, 4, 8)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = 15
CALLS, N_NEW = 5, 16
"""Timed calls of a whole model, and new tokens of each."""
REPEATS = {"cpu": 1, "cuda": 50}
"""Products per sample: on CUDA a single one is too short to be timed."""
Record = dict[str, Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One weight ``[M, E]`` with a share ``ratio`` of zeros, times ``rows`` rows."""

    shape: tuple[int, int]
    ratio: float
    rows: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}-{self.ratio:g}-{self.rows}-rows"

    @property
    def forms(self) -> tuple[Weights, ...]:
        both = (Weights.DENSE, Weights.BITMAP)
        if self.device != "cpu":
            return both
        # Expanding the larger bitmap takes a second and adds no information.
        return (Weights.DENSE, Weights.CSR) if self.shape == SHAPES[1] else (*both, Weights.CSR)


@dataclass(frozen=True)
class Measurement:
    """By form: seconds of one product, sample by sample, and bytes of the weight."""

    case: Case
    samples: dict[Weights, list[float]]
    nbytes: dict[Weights, int]
    faults: dict[Weights, str]

    def record(self, form: Weights) -> Record:
        """The results of one form as plain data."""
        dense = statistics.median(self.samples[Weights.DENSE])
        median = statistics.median(self.samples[form])
        return {
            "case": self.case.name,
            "form": form.value,
            "shape": list(self.case.shape),
            "ratio": self.case.ratio,
            "rows": self.case.rows,
            "dtype": dtype_name(DTYPES[self.case.device]),
            "threads": torch.get_num_threads(),
            "median_ms": 1e3 * median,
            "samples_ms": [1e3 * sample for sample in self.samples[form]],
            "speedup_vs_dense": dense / median,
            "bytes": self.nbytes[form],
            "bytes_vs_dense": self.nbytes[form] / self.nbytes[Weights.DENSE],
            "gb_per_s": self.nbytes[form] / median / 1e9,
            **environment(self.case.device),
        }


def cases(device: str = "cpu", shapes: Sequence[tuple[int, int]] = SHAPES) -> Iterator[Case]:
    for shape in shapes:
        for ratio in RATIOS:
            for rows in ROWS[device]:
                yield Case(shape, ratio, rows, device)


@torch.inference_mode()
def measure(case: Case, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Measurement:
    """Checks every form, then times the correct ones."""
    dtype = DTYPES[case.device]
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(case.shape[1], case.shape[0], bias=False)
    dense.weight.copy_(torch.randn(case.shape, generator=generator))
    dense.weight[torch.rand(case.shape, generator=generator) < case.ratio] = 0
    x64 = torch.randn(case.rows, case.shape[1], generator=generator).to(dtype).double()
    dense, x = dense.to(case.device, dtype), x64.to(case.device, dtype)
    bitmap = BitmapLinear.of(dense)
    ways: dict[Weights, Any] = {Weights.DENSE: dense, Weights.BITMAP: bitmap}
    if Weights.CSR in case.forms:
        ways[Weights.CSR] = CsrLinear.from_bitmap(bitmap)
    ways = {form: ways[form] for form in case.forms}
    truth, eager = x64 @ dense.weight.double().cpu().t(), _plain(x, dense.weight)
    found = {form: budget(form.value, way(x), eager, truth) for form, way in ways.items()}
    faults = {form: str(each) for form, each in found.items() if not each.holds}
    samples: dict[Weights, list[float]] = {form: [] for form in ways if form not in faults}
    for way in ways.values():
        way(x)
    for number in range(rounds):
        for form in rotated(list(samples), number):
            samples[form].append(_seconds(ways[form], x, clock))
    nbytes = {form: _bytes_of(way) for form, way in ways.items()}
    return Measurement(case, samples, nbytes, faults)


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    """The product summed term by term in fp32, by definition; libraries round less."""
    y = torch.zeros(len(x), len(weight), device=x.device)
    for column, own in zip(x.t().float(), weight.t().contiguous().float(), strict=True):
        y.addcmul_(column[:, None], own)
    return y.to(x.dtype)


def _seconds(way: Callable[[Tensor], Tensor], x: Tensor, clock: Clock) -> float:
    repeats = REPEATS[x.device.type]
    begin = clock()
    for _ in range(repeats):
        way(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (clock() - begin) / repeats


def _bytes_of(way: Any) -> int:
    return int(way.weight.nbytes if isinstance(way, nn.Linear) else way.nbytes)


@torch.inference_mode()
def measure_models(ratio: float) -> list[Record]:
    """Whole calls of a pruned model in either form; raises RuntimeError if tokens differ."""
    both = models(HALF_BILLION.build, torch.float32, "cpu")
    dense = both.ours
    prune_(dense, Recipe("magnitude", ratio))
    shared = {id(parameter): parameter for parameter in dense.parameters()}
    sparse = copy.deepcopy(dense, shared)
    size = compress_(sparse, Weights.CSR)
    inputs = prompts(both.hf, HALF_BILLION, 1)
    forms = {Weights.DENSE: dense, Weights.CSR: sparse}
    runs: dict[Weights, list[Run]] = {form: [] for form in forms}
    for number in range(1 + CALLS):
        for form in rotated(list(forms), number):
            run = run_once(forms[form], inputs, N_NEW)
            if number:  # the first call is not timed
                runs[form].append(run)
    if not torch.equal(runs[Weights.DENSE][0].tokens, runs[Weights.CSR][0].tokens):
        raise RuntimeError(f"{ratio:.0%} zeros: tokens of the dense and the sparse model differ")
    nbytes = {Weights.DENSE: size.dense_bytes, Weights.CSR: size.sparse_bytes}
    return [
        {
            "case": f"{HALF_BILLION.name}-{ratio:g}",
            "form": form.value,
            "ratio": ratio,
            "n_rows": inputs["input_ids"].shape[1],
            "n_new": N_NEW,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            **{f"{group}_ms": 1e3 * median(own, group) for group in ("prefill", "decode", "e2e")},
            "samples_ms": {
                group: [1e3 * float(getattr(run, group)) for run in own]
                for group in ("prefill", "decode", "e2e")
            },
            "bytes": nbytes[form],
            **environment("cpu"),
        }
        for form, own in runs.items()
    ]


def models_table(records: Sequence[Record]) -> str:
    """Markdown: one line per model and form."""
    lines = [
        "| zeros | form | prompt, ms | a token, ms | call, ms | pruned weights, MB |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for own in records:
        numbers = " | ".join(f"{own[f'{g}_ms']:.0f}" for g in ("prefill", "decode", "e2e"))
        lines.append(
            f"| {own['ratio']:.0%} | {own['form']} | {numbers} | {own['bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def table(records: Sequence[Record]) -> str:
    """Markdown: one line per case and form, with milliseconds and speed-ups."""
    lines = [
        "| weight | zeros | rows | form | ms | against dense | bytes against dense |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for own in records:
        shape = " x ".join(map(str, own["shape"]))
        lines.append(
            f"| {shape} | {own['ratio']:.0%} | {own['rows']} | {own['form']} "
            f"| {own['median_ms']:.2f} | {own['speedup_vs_dense']:.2f}x "
            f"| {own['bytes_vs_dense']:.2f}x |"
        )
    return "\n".join(lines)


def _named(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures all cases; returns the exit code: 1 if a form is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(ROWS), default="cpu")
    parser.add_argument("--shape", action="append", choices=[_named(each) for each in SHAPES])
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, timed by its CPU time: for a machine with other load",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--models", action="store_true", help="also time whole calls, on the CPU")
    parser.add_argument("--save", action="store_true", help="write results/sparse-<machine>.json")
    options = parser.parse_args(arguments)
    records, wrong = [], 0
    shapes = [each for each in SHAPES if options.shape is None or _named(each) in options.shape]
    clock: Clock = time.perf_counter
    if options.cpu_time:
        if options.device != "cpu" or options.models:
            parser.error("--cpu-time: allowed only with --device cpu and without --models")
        torch.set_num_threads(1)
        clock = time.thread_time
    for case in cases(options.device, shapes):
        found = measure(case, options.rounds, clock)
        wrong += len(found.faults)
        for form, fault in found.faults.items():
            print(f"{case.name}: {form.value} is wrong: {fault}", file=sys.stderr)
        if Weights.DENSE not in found.faults:  # all speed-ups are over it
            records += [found.record(form) for form in found.samples]
    print(table(records))
    whole = [own for ratio in RATIOS for own in measure_models(ratio)] if options.models else []
    if whole:
        print(f"\n{models_table(whole)}")
    if options.save and not wrong:
        path = Path(__file__).parent / "results" / f"sparse-{file_name(options.device)}"
        kept = {
            "command": shlex.join(
                ["python", "-m", "benchmarks.sparse", *(arguments or sys.argv[1:])]
            ),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "load": os.getloadavg(),
            "clock": "CPU time of one thread" if options.cpu_time else "wall",
            "records": records,
            "models": whole,
        }
        write_json(path, kept, indent=1)
        print(f"\nresults: {path}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
