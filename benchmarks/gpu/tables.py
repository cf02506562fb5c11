"""Tuning tables: written where kernels look for them, and copied beside the results.

An entry is ``{"rows", "shape", "config", "measured"}``; ``measured`` is null if it was not timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cells import Setting
from benchmarks.gpu.results import Results
from benchmarks.records import environment, file_name
from fastskip.kernels import tuning

Config = Mapping[str, Any]
FOLDER = "tables"


@dataclass(frozen=True)
class Question:
    """What a launcher looks up in the tables."""

    kernel: str
    rows: int
    shape: tuple[int, ...]


def write_tables(setting: Setting, answers: Mapping[Question, Any]) -> None:
    """Writes tables into the package, for use from now on, and a copy beside the results.

    An answer is what a tuning cell found: the configuration and its measured performance.
    """
    if not answers:
        return
    device = setting.device
    slug = file_name(device.type).removesuffix(".json")
    entries = _entries(answers, device)
    folders = [setting.folder / FOLDER / slug]
    if not setting.is_tiny:
        folders.append(tuning.FOLDER / slug)
    for folder in folders:
        _merge(folder / "gpu.json", _about(device))
        for kernel, own in entries.items():
            _merge(folder / f"{kernel}.json", own)
    _forget()


def install_tables(results: Results) -> None:
    """Merges tables that an earlier run left beside its results into the package's."""
    kept = results.folder / FOLDER
    if torch.cuda.is_available() and kept.is_dir():
        for file in kept.glob("*/*.json"):
            _merge(tuning.FOLDER / file.parent.name / file.name, json.loads(file.read_text()))
        _forget()


def _about(device: torch.device) -> dict[str, Any]:
    about = environment(device.type)
    arch = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    measured = {**about, "date": f"{datetime.now(UTC):%Y-%m-%d}", "by": "python -m benchmarks.gpu"}
    return {"name": about["device"], "arch": arch, "measured": measured}


def _entries(answers: Mapping[Question, Any], device: torch.device) -> dict[str, list[Any]]:
    """Table entries by kernel.

    An entry of this shape would also serve fewer rows, down to the next entry of the shape. So the
    configurations that these row counts have used so far are written too, as not measured.
    """
    entries: dict[str, list[Any]] = {}
    for question, best in answers.items():
        own = entries.setdefault(question.kernel, [])
        measured = {key: round(best[key], 3) for key in ("us", "gb_per_s")}
        own.append(_entry(question, best["config"], measured))
        fewer = (1 << power for power in range(question.rows.bit_length()))
        for rows in (rows for rows in fewer if rows < question.rows):
            smaller = replace(question, rows=rows)
            if smaller not in answers:
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


def _merge(path: Path, new: Any) -> None:
    """New entries replace those for the same rows and shape, unless only the old one is
    measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(new) + "\n"
    if isinstance(new, list):
        merged = (
            {_key(item): item for item in json.loads(path.read_text())} if path.exists() else {}
        )
        for item in new:
            if item.get("measured") or not merged.get(_key(item), {}).get("measured"):
                merged[_key(item)] = item
        ordered = sorted(merged.values(), key=lambda x: (str(x["shape"]), x["rows"] or 1 << 40))
        text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in ordered) + "\n]\n"
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


def _key(item: Mapping[str, Any]) -> tuple[Any, str]:
    return item["rows"], str(item["shape"])


def _forget() -> None:
    for kept in (tuning.read_table, tuning.tables_for, tuning._tables_on):
        kept.cache_clear()
