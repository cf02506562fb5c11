"""Which configuration is the fastest: every kernel's candidates, timed at one model's shapes.

Every operation is called with one question to the tuning tables answered differently: which kernel,
how many rows, what shape. The answer that is the fastest is written to ``kernels/tables/<gpu>/``,
with the rate it reached.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.compiling import compile_ahead
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Widths
from benchmarks.gpu.prefill_works import PREFILL
from benchmarks.gpu.results import Results, Values
from benchmarks.gpu.timing import seconds
from benchmarks.gpu.works import DECODE, DECODE_ARRANGED, Work, on_own_memory
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
    rows = rows or widths.context
    found: dict[str, Any] = {}
    answered: dict[Question, Any] = {}
    failures: dict[str, str] = {}
    for name, maker in works.items():
        if setting.seconds_left < 0:
            failures[name] = "no time was left"
            continue
        try:
            new = _tune_work(setting, on_own_memory(maker, widths, rows, setting), answered)
        except Exception as error:
            if is_lost(setting.device):
                raise
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        answered |= new
        found |= {f"{q.kernel}, {q.rows} rows ({name})": best for q, best in new.items()}
    _write_tables(setting, answered)
    if failures and not found:
        raise RuntimeError("\n".join(f"{name}: {fault}" for name, fault in failures.items()))
    return {"widths": widths.name, "kernels": found, "failures": failures}


def install_tables(results: Results) -> None:
    """Puts tables that an earlier run left beside its results where kernels look for them."""
    kept = results.folder / TABLES
    if torch.cuda.is_available() and kept.is_dir():
        for file in kept.glob("*/*.json"):
            _merge_file(tuning.FOLDER / file.parent.name / file.name, json.loads(file.read_text()))
        _forget_tables()


def _tune_work(
    setting: Setting, works: Sequence[Work], answered: dict[Question, Any]
) -> dict[Question, Any]:
    """Tunes what one operation asks of the tables, the same on different weights."""
    from fastskip.ops import compiled

    device = setting.device
    with _answering({}) as asked, recording(is_dry=True):
        works[0].run(compiled)
    found = {}
    for question, current in asked.items():
        configs = [] if question in answered else _candidates(question, current)
        if setting.is_tiny:
            configs = configs[:TINY_CANDIDATES]
        if configs:
            calls = (partial(_answered, {question: config}, works[0]) for config in configs)
            compile_ahead(calls, device)
            found[question] = _fastest(setting, works, question, configs)
    return found


def _fastest(
    setting: Setting, works: Sequence[Work], question: Question, configs: Sequence[Config]
) -> dict[str, Any]:
    """The fastest configuration, with what it reached; and why others did not run."""
    times: list[tuple[float, Config]] = []
    faults: list[str] = []
    for config in configs:
        if setting.seconds_left < 0:
            break
        try:
            calls = [partial(_answered, {question: config}, work) for work in works]
            times.append((seconds(calls, setting.device, REPLAYS), config))
        except Exception as error:
            if is_lost(setting.device):
                raise
            faults.append(f"{dict(config)}: {type(error).__name__}: {error}"[:300])
    if not times:
        raise RuntimeError(f"{question}: no candidate ran: {faults[:1]}")
    return {**_best(times, configs, works[0], setting), "faults": faults}


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


def _candidates(question: Question, current: Config) -> list[Config]:
    """What is in use, then the candidates of the kernel's file, if they are meant for it.

    A file may hold several kernels; its candidates are for those with the same block sizes.
    """
    offered = []
    for file in sorted(tuning.FOLDER.parent.glob("*.py")):
        module = import_module(f"fastskip.kernels.{file.stem}")
        if hasattr(module, f"_{question.kernel}_kernel") and hasattr(module, "candidates"):
            offered += module.candidates(question.rows, question.shape)
    fitting = [config for config in offered if _blocks(config) == _blocks(current)]
    return [current, *(config for config in fitting if config != current)] if fitting else []


def _blocks(config: Config) -> set[str]:
    return {name for name in config if name.startswith("BLOCK")}


def _answered(answers: Mapping[Question, Config], work: Work) -> None:
    from fastskip.ops import compiled

    with _answering(answers):
        work.run(compiled)


@contextmanager
def _answering(answers: Mapping[Question, Config]) -> Iterator[dict[Question, Config]]:
    """Within this block the tables answer so; yields what was asked, with the answers."""
    asked: dict[Question, Config] = {}
    usual: Callable[..., Config] = tuning.config_for

    def config_for(
        kernel: str, device: torch.device, rows: int, shape: tuple[int, ...] = ()
    ) -> Config:
        question = Question(kernel, rows, shape)
        found = answers.get(question) or usual(kernel, device, rows, shape)
        asked[question] = dict(found)
        return asked[question]

    tuning.config_for = config_for
    try:
        yield asked
    finally:
        tuning.config_for = usual


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
    entries = _entries(answered, device)
    gpu = {"name": about["device"], "arch": arch, "measured": measured}
    folders = [setting.folder / TABLES / slug]
    if not setting.is_tiny:
        folders.append(tuning.FOLDER / slug)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(gpu, indent=1) + "\n")
        for kernel, own in entries.items():
            _merge_file(folder / f"{kernel}.json", own)
    _forget_tables()


def _entries(answered: Mapping[Question, Any], device: torch.device) -> dict[str, list[Any]]:
    """Table entries by kernel.

    An entry of this shape would also serve fewer rows, down to the next entry of the shape. So
    what these rows have used so far, as far as it is not measured, is written down with it.
    """
    entries: dict[str, list[Any]] = {}
    for question, best in answered.items():
        own = entries.setdefault(question.kernel, [])
        measured = {key: round(best[key], 3) for key in ("us", "gb_per_s")}
        own.append(_entry(question, best["config"], measured))
        fewer = (1 << power for power in range(question.rows.bit_length()))
        for rows in (rows for rows in fewer if rows < question.rows):
            smaller = replace(question, rows=rows)
            if smaller not in answered:
                usual = tuning.config_for(question.kernel, device, rows, question.shape)
                own.append(_entry(smaller, usual, None))
    return entries


def _entry(question: Question, config: Config, measured: Config | None) -> dict[str, Any]:
    return {
        "rows": question.rows,
        "shape": list(question.shape),
        "config": dict(config),
        "measured": measured,
    }


def _merge_file(path: Path, new: Any) -> None:
    """New entries take the place of those for the same rows and shape that are worth no more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(new, list):
        known = json.loads(path.read_text()) if path.exists() else []
        merged = {(item["rows"], str(item["shape"])): item for item in known}
        for item in new:
            key = item["rows"], str(item["shape"])
            if item.get("measured") or not merged.get(key, {}).get("measured"):
                merged[key] = item
        new = list(merged.values())
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
    _cell(widths, rows, widths is SEVEN and rows in (1, 16, 0))
    for widths in (SEVEN, THIRTEEN)
    for rows in (1, 16, 0, 4, 64)
]
