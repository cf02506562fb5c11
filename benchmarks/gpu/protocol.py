"""The protocol: all cells in order, and what the command line does with them."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import (
    ceilings,
    comparison,
    correctness,
    end_to_end,
    graphs,
    profiling,
    routing,
    step_ways,
    tune,
)
from benchmarks.gpu.cells import Cell, Setting, chosen
from benchmarks.gpu.results import Results
from benchmarks.gpu.running import UNUSABLE, run, supervise
from benchmarks.gpu.table import text_tables
from benchmarks.gpu.tables import install_tables
from benchmarks.records import file_name

CELLS: list[Cell] = [
    *ceilings.CELLS,
    *correctness.CELLS,
    *tune.CELLS,
    *end_to_end.CELLS,
    *routing.CELLS,
    *profiling.CELLS,
    *comparison.CELLS,
    *graphs.CELLS,
    *step_ways.CELLS,
]
SAME_IN_SMALL = re.compile(r"\.(13b|b4$|b16|b64|half_blocks|parallel_blocks|float16|project)(\.|$)")
"""Cells that with --tiny would repeat what other cells run."""
RESULTS = Path(__file__).parents[1] / "results"


def start(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Does what the options say; returns the exit status."""
    device = _device(options.tiny, is_needed=not (options.list or options.tables))
    slug = "tiny" if options.tiny else file_name(device.type).removesuffix(".json")
    results = Results(options.results or RESULTS / slug)
    cells = chosen(CELLS, options.cells)
    if options.tiny and not options.cells:
        cells = [cell for cell in CELLS if not SAME_IN_SMALL.search(cell.name)]
    if options.list:
        _print_list(CELLS, results)
        return 0
    if not options.tables:
        install_tables(results)
        _measure(cells, Setting(results, device, options.tiny), options, arguments)
    if not options.same_process or options.tables:
        print(text_tables(results))
    lines = results.lines()
    return int(any(cell.name in lines and not lines[cell.name].is_done for cell in cells))


def _measure(
    cells: Sequence[Cell], setting: Setting, options: argparse.Namespace, arguments: Sequence[str]
) -> None:
    done = set() if options.again else setting.results.done()
    todo = [cell for cell in cells if cell.name not in done]
    for cell in cells:
        if cell.name in done:
            print(f"{cell.name}: done already")
    began = time.perf_counter()
    if options.same_process:
        if not run(todo, setting, say=_say):
            sys.exit(UNUSABLE)
        return
    # Child processes get all options; which cells they run is decided here.
    passed = ["--results", str(setting.folder), "--again", "--same-process"]
    command = [sys.executable, "-m", "benchmarks.gpu", *passed, *["--tiny"] * options.tiny]
    supervise(todo, setting.results, command, options.budget, say=_say)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")


def _say(text: str) -> None:
    print(text, flush=True)


def _device(is_tiny: bool, is_needed: bool) -> torch.device:
    if is_tiny or (not is_needed and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device; --tiny runs everything at tiny shapes on the CPU")
    return torch.device("cuda")


def _print_list(cells: Sequence[Cell], results: Results) -> None:
    lines = results.lines()
    width = max(len(cell.name) for cell in cells)
    for cell in cells:
        line = lines.get(cell.name)
        state = "" if line is None else "done" if line.is_done else "failed"
        mark = "*" if cell.is_default else " "
        print(f"{mark} {cell.name:{width}}  {cell.minutes:4.1f} min  {state:6}  {cell.about}")
    print(f"\n* runs by default. Results: {results.path}")
