"""Runs cells one after another and records what fails.

``run`` runs them in this process. ``supervise`` starts processes that do, and kills one that hangs.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import torch

from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.results import Line, Results
from benchmarks.records import environment

UNUSABLE = 3
"""Exit status of a process whose device no longer responds."""
START_S = 60.0
"""Seconds that a process may take for its imports."""
ALLOWANCE = 2.0
"""A cell is killed after this many times its minutes."""
GRACE_S = 20.0
"""A cell running this long after the budget is used up is killed, for the next run to do."""
Say = Callable[[str], object]


def run(cells: Sequence[Cell], setting: Setting, say: Say = print) -> bool:
    """Runs the cells in this process; returns whether the device is still usable."""
    for cell in cells:
        say(f"{cell.name}: {cell.about} ...")
        setting = replace(setting, minutes=cell.minutes, began=time.perf_counter())
        line = _attempt(cell, setting)
        is_usable = _clean_up(setting)
        setting.results.append(line)
        outcome = "done" if line.is_done else f"FAILED: {line.reason}"
        say(f"{cell.name}: {outcome} ({line.seconds:.0f} s)")
        if not is_usable:
            return False
    return True


def supervise(
    cells: Sequence[Cell], results: Results, command: Sequence[str], budget: float, say: Say = print
) -> list[Cell]:
    """Runs each group in its own process, for ``budget`` minutes in all; returns the cells left.

    ``command``, followed by names of cells, runs these cells in a process.
    """
    end = time.perf_counter() + 60 * budget
    left: list[Cell] = []
    for _, group in groupby(cells, key=lambda cell: cell.group):
        todo = list(group)
        while todo:
            fitting = _fitting(todo, (end - time.perf_counter()) / 60)
            if not fitting:
                left += todo
                break
            before = results.path.stat().st_size if results.path.exists() else 0
            _one_process(fitting, results, command, end)
            written = _written(results, before)
            # Cells that did not fit are tried again with the time left then.
            todo = [cell for cell in todo if cell.name not in written]
    for cell in left:
        say(f"{cell.name}: left for the next run; the budget of {budget:g} minutes is used up")
    return left


def _attempt(cell: Cell, setting: Setting) -> Line:
    begin = time.perf_counter()
    about = environment(setting.device.type)
    try:
        values = cell.run(setting)
        error = None
    except Exception:
        values, error = {}, traceback.format_exc()
    seconds = time.perf_counter() - begin
    return Line(cell.name, round(seconds, 1), values, error, about)


def _clean_up(setting: Setting) -> bool:
    """Frees what the cell held; returns whether the device still responds."""
    gc.collect()
    if is_lost(setting.device):
        return False
    if setting.device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return True


def _fitting(cells: Sequence[Cell], minutes: float) -> list[Cell]:
    """The leading cells that fit; the last one may start if half of its minutes are left."""
    found = []
    for cell in cells:
        if minutes < cell.minutes / 2:
            break
        found.append(cell)
        minutes -= cell.minutes
    return found


def _one_process(
    cells: Sequence[Cell], results: Results, command: Sequence[str], end: float
) -> None:
    """Runs the cells in one process, until ``end`` at the latest.

    If the process fails, the first cell without a line gets one that says why.
    """
    before = results.path.stat().st_size if results.path.exists() else 0
    process = subprocess.Popen([*command, *(cell.name for cell in cells)], start_new_session=True)
    reason = ""
    is_late = False
    written: list[str] = []
    try:
        since = time.perf_counter()
        while process.poll() is None and not is_late:
            time.sleep(0.2)
            is_late = time.perf_counter() > end + GRACE_S
            now = _written(results, before)
            if len(now) > len(written):
                written, since = now, time.perf_counter()
            if len(written) < len(cells):
                limit = START_S + ALLOWANCE * 60 * cells[len(written)].minutes
                if time.perf_counter() - since > limit:
                    reason = f"took more than {limit:.0f} s and was killed"
                    break
    finally:
        _end(process)
    written = _written(results, before)
    if len(written) < len(cells) and process.returncode != UNUSABLE and not is_late:
        reason = reason or f"the process exited with status {process.returncode}"
        name = cells[len(written)].name
        results.append(Line(name, 0.0, error=reason))
        print(f"{name}: {reason}", file=sys.stderr)


def _written(results: Results, before: int) -> list[str]:
    """Cells whose lines were written after the first ``before`` bytes of the file, in order."""
    if not results.path.exists():
        return []
    return list(Results.parse(results.path.read_bytes()[before:].decode()))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its children, also those that it has left behind: they would go on
    using the GPU while later cells are timed."""
    with suppress(ProcessLookupError):  # there are none
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
