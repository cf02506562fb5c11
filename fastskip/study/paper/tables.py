"""The numbers as CSV files, with one line per cell, layer and class, or model."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastskip.study.paper.results import Results, Row, Score


def write(results: Results, folder: Path) -> list[Path]:
    """Write `cells.csv`, `similarity.csv` and `speeds.csv`; returns their paths."""
    tables = {
        "cells": [cell_line(row) for row in results.rows],
        "similarity": [each.to_dict() for each in results.similarity],
        "speeds": [
            {
                "name": each.name,
                "ttft_ms": 1e3 * each.ttft_s,
                "tpot_ms": 1e3 * each.tpot_s,
                "kv_bytes": each.kv_bytes,
                "flops": each.flops,
            }
            for each in results.speeds
        ],
    }
    paths = []
    for name, lines in tables.items():
        if lines:
            paths.append(folder / f"{name}.csv")
            _write(paths[-1], lines)
    return paths


def cell_line(row: Row) -> dict[str, Any]:
    """One cell as a CSV line: what it is, its compute, and scores as shares."""
    schedule = row.schedule
    return {
        "name": row.name,
        "section": row.section.value,
        "label": row.label,
        "size": row.size,
        "parameters": row.parameters,
        "part": "" if schedule is None else schedule.part.value,
        "scope": "" if schedule is None else schedule.scope.value,
        "interval": "" if schedule is None else schedule.interval,
        "start": "" if schedule is None else schedule.start,
        "removed": row.removed,
        "learned": row.learned.value,
        "patience": row.patience,
        "question_compute": row.question_compute,
        "caption_compute": row.caption_compute,
        **_score("questions", row.questions),
        **_score("captions", row.captions),
        **_score("whole_captions", row.whole_captions),
        "seconds": row.seconds,
    }


def _score(name: str, score: Score) -> dict[str, Any]:
    return {
        f"{name}_items": score.items,
        f"{name}_score": score.score.mean,
        f"{name}_low": score.score.low,
        f"{name}_high": score.score.high,
        f"{name}_kept": score.kept,
        f"{name}_kept_spread": "" if score.spread is None else score.spread,
        f"{name}_change": score.change.mean,
        f"{name}_change_low": score.change.low,
        f"{name}_change_high": score.change.high,
    }


def _write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
