"""`fastskip demo`: pictures with questions and answers, then accuracy and speed of policies."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastskip import machine
from fastskip.demo import checkpoint_path, terminal
from fastskip.demo.measure import (
    QUICK,
    Bench,
    Effort,
    Tick,
    examples,
    qualities,
    speeds,
)
from fastskip.demo.policies import DENSE, HF, candidates
from fastskip.demo.results import Report, Row, Score, environment, speed
from fastskip.json_file import write_json
from fastskip.plotting import require
from fastskip.timing import PHASES, threads_set

DTYPE = torch.float32


def run(plots: Path | None = None, quick: bool = False, json: Path | None = None) -> Report:
    """Run the demo, print its results and, if paths are given, write plots and numbers."""
    if plots is not None:
        require("--plots")
        plots.mkdir(parents=True, exist_ok=True)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    busy = _load()
    report = _measure(console, QUICK if quick else Effort(), quick)
    console.print(terminal.summary(report))
    console.print(terminal.closeness(report))
    console.print(terminal.notes(report))
    if busy > 0.5 * (os.cpu_count() or 1):
        console.print(
            f"The machine was busy before the demo (load {busy:.1f}): times are noisy, rerun it.",
            style="yellow",
        )
    if json is not None:
        write_json(json, report.to_dict(), indent=1)
        console.print(f"wrote {json}", soft_wrap=True)
    if plots is not None:
        from fastskip.demo.plots import write

        for path in write(report, plots):
            console.print(f"wrote {path}", soft_wrap=True)
    return report


def _measure(console: Console, effort: Effort, quick: bool) -> Report:
    began = time.perf_counter()
    bench = Bench.load(checkpoint_path(), DTYPE)
    chosen = candidates(bench.depth, quick)
    plans = bench.plans(chosen)
    size = sum(parameter.numel() for parameter in bench.ours.parameters())
    model = {
        "name": "bundled checkpoint",
        "class": type(bench.ours).__name__,
        "layers": bench.depth,
        "parameters": size,
    }
    console.print(
        f"[bold]fastskip demo[/]: a LLaVA with {bench.depth} decoder layers and {size / 1e6:.1f} M "
        "weights, on held-out pictures\n",
        soft_wrap=True,
    )
    with threads_set(1):  # a handful of prompts: threads would only wait for each other
        answered = examples(bench, [each for each in chosen if each.is_shown], effort.examples)
    console.print(terminal.gallery(answered, console.width, console.color_system is not None))

    counts = sorted({1, torch.get_num_threads()})
    with _bar("speed", effort.rounds) as tick:
        workload, runs = speeds(bench, chosen, counts, effort, tick)
    counts = sorted({count for _, count in runs})
    ceilings = {}
    with _bar("ceilings of this machine", len(counts)) as tick:
        for count in counts:
            with threads_set(count):
                ceilings[count] = machine.measure_ceilings(DTYPE)
            tick()
    with _bar("accuracy", effort.chunks) as tick:
        left = effort.total_s - (time.perf_counter() - began)
        judged = qualities(bench, chosen, counts, effort, left, tick)

    hf, dense = (judged[each.label][1] for each in (HF, DENSE))
    same = sum(a == b for a, b in zip(hf, dense, strict=True))
    rows = []
    for each in chosen:
        prefill, decode = (speed(each, phase, runs, plans, workload, ceilings) for phase in PHASES)
        rows.append(Row(each, plans[each.label], judged[each.label][0], prefill, decode))
    return Report(
        model=model,
        environment=environment(DTYPE),
        workload=workload,
        ceilings=ceilings,
        agreement=Score(same, len(hf)),
        examples=answered,
        rows=tuple(rows),
    )


def _load() -> float:
    """Load average of the last minute; 0 where it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


@contextmanager
def _bar(title: str, total: int) -> Iterator[Tick]:
    """A progress bar on stderr, as stdout may go into a pipe; yields the call that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
