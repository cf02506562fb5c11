"""Markdown tables, and bars as a PNG, from a file of results.

python -m benchmarks.report benchmarks/results/<machine>.json [--case TEXT] [--png PATH]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fastskip.json_file import write_json
from fastskip.plotting import is_available, subplots
from fastskip.wording import significant

Record = dict[str, Any]
GROUPS = ("prefill", "decode", "e2e")
HEAD = (
    "",
    *("prefill, ms (floor)", "vs HF", "vs dense", "of ideal"),
    *("ms/token (floor)", "vs HF", "vs dense", "of ideal"),
    *("call, ms", "vs HF", "vs dense"),
    "KV, MB",
    "threads",
)


@dataclass(frozen=True)
class Results:
    """Records of benchmark runs; each names its `command` and `date`."""

    records: list[Record]

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        write_json(path, asdict(self), indent=1)

    def renewed(self, records: Sequence[Record]) -> Results:
        """A copy in which these records replace their cases in place; new cases come last."""
        cases = {
            case: [record for record in found if record["case"] == case]
            for found in (self.records, records)
            for case in dict.fromkeys(record["case"] for record in found)
        }
        return Results([record for own in cases.values() for record in own])


@dataclass(frozen=True)
class Table:
    """One case: a title, and a row of cells for each peer."""

    title: str
    rows: list[tuple[str, ...]]


def tables(records: Sequence[Record]) -> list[Table]:
    """One table per case, in the order of the records."""
    made = []
    for _, group in groupby(records, key=lambda record: record["case"]):
        peers: dict[str, dict[str, Record]] = {}
        for record in group:
            peers.setdefault(record["label"], {})[record["group"]] = record
        first = next(iter(next(iter(peers.values())).values()))
        made.append(Table(_title(first), [_row(label, own) for label, own in peers.items()]))
    return made


def markdown(table: Table) -> str:
    """An aligned pipe table under its title; empty columns are left out."""
    used = [i for i in range(len(HEAD)) if i == 0 or any(row[i] for row in table.rows)]
    lines = [[row[i] for i in used] for row in (HEAD, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(line)} |" for line in padded)])


def environments(records: Sequence[Record]) -> list[str]:
    """Where the numbers come from, one line per run."""
    most = max(record["threads"] for record in records)
    lines = (
        f"{own['device']}, threads: up to {most}, torch {own['torch']}, transformers "
        f"{own['transformers']}, commit {own['commit'] or 'unknown'}, {own['date']}: "
        f"`{own['command']}`"
        for own in records
    )
    return list(dict.fromkeys(lines))


def plot(records: Sequence[Record]) -> Any:
    """Bars of the speed-up over Hugging Face; one panel per case."""
    cases = [list(group) for _, group in groupby(records, key=lambda record: record["case"])]
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    size = (5.2 * columns, 3.6 * lines)
    figure, axes = subplots(lines, columns, size, sharex=True)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        labels = list(dict.fromkeys(record["label"] for record in case))
        for offset, group in enumerate(GROUPS):
            found = {r["label"]: r["speedup_vs_hf"] for r in case if r["group"] == group}
            places = [labels.index(label) + 0.27 * (offset - 1) for label in found]
            axis.barh(places, list(found.values()), height=0.25, label=group)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(labels)), labels)
        axis.invert_yaxis()
        axis.tick_params(labelbottom=True)
        axis.set_title(_title(case[0]).replace(": ", ":\n"), loc="right", fontsize="small")
        axis.set_xlabel("times as fast as Hugging Face")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _title(record: Record) -> str:
    subject = f"{record['subject']}, " if record.get("subject") else ""
    images, texts = counts(record["n_visual"]), counts(record["n_text"])
    return (
        f"{subject}{record['model']} ({record['weights']} weights), {record['dtype']}, batch "
        f"{record['batch']}: {images} image and {texts} text rows, {record['n_new']} new tokens"
    )


def counts(rows: int | Sequence[int]) -> str:
    """The row count of all prompts, or of each; a repeating sequence of counts is written once."""
    if isinstance(rows, int):
        return str(rows)
    periods = (n for n in range(1, len(rows) + 1) if len(rows) % n == 0)
    own = next(rows[:n] for n in periods if list(rows[:n]) * (len(rows) // n) == list(rows))
    return "/".join(map(str, own))


def _row(label: str, groups: dict[str, Record]) -> tuple[str, ...]:
    cells = [label]
    for group in GROUPS:
        own = groups.get(group, {})
        has_floor = group != "e2e"  # vision has none
        time, floor = (_number(own.get(key), "ms") for key in ("median_ms", "floor_ms"))
        cells.append(f"{time} ({floor})" if has_floor and time else time)
        cells += [_number(own.get(f"speedup_vs_{other}"), "times") for other in ("hf", "dense")]
        cells += [_number(own.get("share_of_ideal"), "share")] * has_floor
    records = [groups[group] for group in GROUPS if group in groups]
    threads = dict.fromkeys(str(record["threads"]) for record in records)
    cells += [f"{records[0]['kv_bytes'] / 1e6:.1f}", "/".join(threads)]
    return tuple(cells)


def _number(value: float | None, kind: str) -> str:
    if value is None:
        return ""
    if kind == "ms":
        return significant(value)
    return f"{value:.2f}" + ("x" if kind == "times" else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a file's tables; draw the bars beside it if matplotlib is installed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--png", type=Path, help="default: the file's name with .png")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        parser.error(f"{options.file}: no such file; pytest benchmarks/ --save-results writes one")
    results = Results.load(options.file)
    records = [record for record in results.records if options.case in record["case"]]
    if not records:
        names = ", ".join(dict.fromkeys(record["case"] for record in results.records))
        parser.error(f"--case {options.case!r}: no such case; allowed: {names}")
    for table in tables(records):
        print(markdown(table), end="\n\n")
    print(*environments(records), sep="\n")
    if is_available():
        plot(records).savefig(options.png or options.file.with_suffix(".png"), dpi=150)
    else:
        print("no PNG was drawn: matplotlib is not installed")


if __name__ == "__main__":
    main()
