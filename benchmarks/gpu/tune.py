"""Which configuration is the fastest: every kernel's candidates, timed at one model's shapes.

Every operation is called with one question to the tuning tables answered differently: which kernel,
how many rows, what shape. The answer that is the fastest is written to ``kernels/tables/<gpu>/``,
with the rate it reached.
"""

from __future__ import annotations

import json
import os
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Maker, Widths
from benchmarks.gpu.results import Results, Values
from benchmarks.gpu.timing import copies, seconds
from benchmarks.gpu.works import DECODE, DECODE_ARRANGED, PREFILL, Work, WorkMaker
from benchmarks.records import environment, file_name
from fastskip.kernels import tuning
from fastskip.kernels.launch import recording

Config = Mapping[str, Any]
TABLES = "tables"
TINY_CANDIDATES = 2
REPLAYS = 5


@dataclass(frozen=True)
class Question:
    """What a launcher asks the tuning tables."""

    kernel: str
    rows: int
    shape: tuple[int, ...]


def tune(setting: Setting, widths: Widths, rows: int) -> Values:
    """Times the candidates of all kernels; ``rows`` 0 stands for the rows of a prompt."""
    widths = TINY if setting.is_tiny else widths
    works = DECODE | DECODE_ARRANGED if rows else PREFILL
    found: dict[str, Any] = {}
    answered: dict[Question, Any] = {}
    failures: dict[str, str] = {}
    for name, maker in works.items():
        if setting.seconds_left < 0:
            failures[name] = "no time was left"
            continue
        for module in _families(maker, widths):
            try:
                found |= _tune_family(
                    setting, widths, rows or widths.context, name, maker, module, answered
                )
            except Exception as error:
                if setting.device.type == "cuda" and "CUDA error" in str(error):
                    raise
                failures[f"{name}, {module.__name__}"] = f"{type(error).__name__}: {error}"
    _write_tables(setting, answered)
    return {"widths": widths.name, "kernels": found, "failures": failures}


def install_tables(results: Results) -> None:
    """Puts tables that an earlier run left beside its results where kernels look for them."""
    kept = results.folder / TABLES
    if torch.cuda.is_available() and kept.is_dir():
        for file in kept.glob("*/*.json"):
            _merge_file(tuning.FOLDER / file.parent.name / file.name, json.loads(file.read_text()))
        _forget_tables()


def _families(maker: WorkMaker, widths: Widths) -> list[types.ModuleType]:
    """The kernel files that have a launcher of the operation's name, and candidates."""
    function = _function(maker, widths)
    found = []
    for file in sorted(tuning.FOLDER.parent.glob("*.py")):
        module = import_module(f"fastskip.kernels.{file.stem}")
        launcher = getattr(module, function, None)
        if getattr(launcher, "__module__", None) == module.__name__ and hasattr(
            module, "candidates"
        ):
            found.append(module)
    return found


def _function(maker: WorkMaker, widths: Widths) -> str:
    """The operation that a work calls; only learnt by making a small one."""
    return maker(Maker(TINY, torch.float32, torch.device("cpu")), 1).function


def _tune_family(
    setting: Setting,
    widths: Widths,
    rows: int,
    name: str,
    maker: WorkMaker,
    module: types.ModuleType,
    answered: dict[Question, Any],
) -> dict[str, Any]:
    """Tunes what this work asks one kernel file; ``answered`` is read and added to."""
    device = setting.device
    first = maker(Maker(widths, setting.dtype, device), rows)
    with _answering({}) as asked, recording(is_dry=True):
        first.run(module)
    works = [first]
    for seed in range(1, copies(first.nbytes, device)):
        works.append(maker(Maker(widths, setting.dtype, device, seed), rows))
    found = {}
    for question, current in asked.items():
        configs = [] if question in answered else _candidates(module, question, current)
        if not configs:
            continue
        if setting.is_tiny:
            configs = configs[:TINY_CANDIDATES]
        _compile(first, module, question, configs, device)
        times: list[tuple[float, Config]] = []
        faults: list[str] = []
        for config in configs:
            if setting.seconds_left < 0:
                break
            with _answering({question: config}):
                try:
                    calls = [partial(work.run, module) for work in works]
                    times.append((seconds(calls, device, REPLAYS), config))
                except Exception as error:
                    if "CUDA error" in str(error):
                        raise
                    faults.append(f"{dict(config)}: {type(error).__name__}: {error}"[:300])
        if not times:
            raise RuntimeError(f"{question}: no candidate ran: {faults[:1]}")
        answered[question] = best = _best(times, configs, first, setting)
        found[f"{question.kernel}, {rows} rows ({name})"] = {**best, "faults": faults}
    return found


def _best(
    times: Sequence[tuple[float, Config]],
    configs: Sequence[Config],
    work: Work,
    setting: Setting,
) -> dict[str, Any]:
    fastest, config = min(times, key=lambda pair: pair[0])
    slowest = max(times, key=lambda pair: pair[0])[0]
    # The first one is what the table said so far.
    before = next((time for time, each in times if each == configs[0]), fastest)
    return {
        "config": dict(config),
        "us": 1e6 * fastest,
        "gb_per_s": work.nbytes / fastest / 1e9,
        "share_of_floor": work.floor_seconds(ceilings_of(setting)) / fastest,
        "us_before": 1e6 * before,
        "us_slowest": 1e6 * slowest,
        "timed": f"{len(times)} of {len(configs)}",
    }


def _candidates(module: types.ModuleType, question: Question, current: Config) -> list[Config]:
    """What is in use, then the file's candidates, if they are meant for this kernel.

    A file may hold several kernels; its candidates are for those with the same block sizes.
    """
    offered = module.candidates(question.rows, question.shape)
    fitting = [c for c in offered if _blocks(c) == _blocks(current)]
    whole = [{**current, **config} for config in fitting]
    return [dict(current), *(c for c in whole if c != dict(current))] if whole else []


def _blocks(config: Config) -> set[str]:
    return {name for name in config if name.isupper()}


@contextmanager
def _answering(answers: Mapping[Question, Config]) -> Iterator[dict[Question, Config]]:
    """Within this block the tables answer so; yields what was asked, with the answers."""
    asked: dict[Question, Config] = {}
    usual: Callable[..., Config] = tuning.config_for

    def config_for(
        kernel: str, device: torch.device, rows: int, shape: tuple[int, ...] = ()
    ) -> Config:
        question = Question(kernel, rows, shape)
        asked[question] = answers.get(question) or usual(kernel, device, rows, shape)
        return asked[question]

    tuning.config_for = config_for
    try:
        yield asked
    finally:
        tuning.config_for = usual


def _compile(
    work: Work,
    module: types.ModuleType,
    question: Question,
    configs: Sequence[Config],
    device: torch.device,
) -> None:
    """Compiles all candidates at once on all cores; what does not compile fails again later."""
    if device.type != "cuda":
        return
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            with _answering({question: config}), recording(is_dry=True) as account:
                work.run(module)
            for launch in account.launches:
                if launch.kernel is not None:
                    launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)


def _write_tables(setting: Setting, answered: Mapping[Question, Any]) -> None:
    """Into the package, for use from now on, and beside the results, to be kept."""
    if not answered:
        return
    device = setting.device
    slug = file_name(device.type).removesuffix(".json")
    about = environment(device.type)
    arch = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    measured = {**about, "date": f"{datetime.now(UTC):%Y-%m-%d}", "by": "python -m benchmarks.gpu"}
    gpu = {"name": about["device"], "arch": arch, "measured": measured}
    folders = [setting.folder / TABLES / slug]
    if not setting.is_tiny:
        folders.append(tuning.FOLDER / slug)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(gpu, indent=1) + "\n")
        for kernel in dict.fromkeys(question.kernel for question in answered):
            entries = [
                {
                    "rows": question.rows,
                    "shape": list(question.shape),
                    "config": best["config"],
                    "measured": {key: round(best[key], 3) for key in ("us", "gb_per_s")},
                }
                for question, best in answered.items()
                if question.kernel == kernel
            ]
            _merge_file(folder / f"{kernel}.json", entries)
    _forget_tables()


def _merge_file(path: Path, new: Any) -> None:
    """New entries take the place of those for the same rows and shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(new, list):
        known = json.loads(path.read_text()) if path.exists() else []
        keys = [(item["rows"], item["shape"]) for item in new]
        new = [item for item in known if (item["rows"], item["shape"]) not in keys] + new
        new.sort(key=lambda item: (str(item["shape"]), item["rows"] or 1 << 40))
        text = "[\n" + ",\n".join(f" {json.dumps(item)}" for item in new) + "\n]\n"
    else:
        text = json.dumps(new) + "\n"
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    shutil.move(draft, path)


def _forget_tables() -> None:
    for kept in (tuning.read_table, tuning.tables_for, tuning._tables_on):
        kept.cache_clear()


def _cell(widths: Widths, rows: int, is_default: bool) -> Cell:
    name = f"tune.{widths.name}.{f'b{rows}' if rows else 'prefill'}"
    what = f"decode at batch {rows}" if rows else "prefill of one prompt"
    about = f"fastest configurations for {what}, {widths.name.upper()} shapes"
    minutes = 1.75 if rows else 1.5
    return Cell(name, about, minutes, partial(tune, widths=widths, rows=rows), is_default)


CELLS = [
    _cell(widths, rows, widths is SEVEN and rows < 17)
    for widths in (SEVEN, THIRTEEN)
    for rows in (1, 16, 0, 4, 64)
]
