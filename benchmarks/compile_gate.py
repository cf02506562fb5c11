"""Does every kernel compile for its target GPUs, and to the intended code?

    python -m benchmarks.compile_gate [--arch 90] [--keep] [--all] [--again]

Needs no GPU. Every launch that the probes (``benchmarks.probes``) make is compiled ahead of time:
for sm_90 with the tables of H200 and H100, at the shapes of all models; for sm_80, sm_89, sm_90
and sm_100 with the conservative defaults, at the shapes of a 7B model. The gate checks

- that each kernel compiles, spills nothing, and fits in the chip's shared memory;
- that kernels which stream weights or cache entries load 16 bytes per thread (``STREAMS``);
- that products use matrix instructions, on sm_90 warp-group ones (``matrix_of``);
- that overlapping launches neither touch memory nor exit before they have waited for the launches
  ahead of them (``kernels.overlap``);
- that some probe reaches every entry of these tables.

It prints a summary of registers, shared memory and spills, and full rows where these differ from
the findings kept in ``benchmarks/results/compile`` (``--keep`` writes there) or where a check
fails. Findings are kept by what the source says (``kernels.sources``): a kernel with the same code
and compiler is not compiled again (unless ``--again``), except for a sample, drawn by code, whose
results must match what is kept. Comments change nothing. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "compile"
ARCHS = (80, 89, 90, 100)
TABLES = {90: ("nvidia-h200", "nvidia-h100-80gb-hbm3", "default")}
"""Tuning tables compiled for an architecture; other architectures have only the default."""

PRODUCTS = {"project_append", "feed", "project_append_feed", "add_terms", "apply_terms", "head"}
"""Products of few rows: they stream weights or use matrix instructions, by block sizes."""
PROMPTS = {"linear_rows": "BLOCK_N", "attend_rows": "BLOCK_Q"}
"""Products of prompt rows, with the block size that sets the rows of a program."""
ENTRIES = {"copy_entries", "read_entries", "attend_step"}
STREAMS = {*PRODUCTS, *PROMPTS, *ENTRIES, "normalize", "activate", "add_rows", "embed"}
"""Kernels whose time is dominated by their loads."""

NUMBERS = ("registers", "shared", "spills", "stack", "wide", "matrix", "waits", "early", "blocks")
ONE_IN = 20
"""One in this many kept findings is compiled again."""

CONSOLE = Console(width=None if sys.stdout.isatty() else 200)
Row = dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """One row of the table: what was compiled, and what came out."""

    table: str
    probe: str
    kernel: str
    model: str
    rows: int
    blocks: Mapping[str, int]
    finding: Any
    faults: tuple[str, ...]
    key: str

    @property
    def label(self) -> tuple[Any, ...]:
        return self.table, self.probe, self.kernel, self.model, self.rows

    @property
    def record(self) -> Row:
        found = asdict(self.finding)
        return {
            **dict(zip(("table", "probe", "kernel", "model", "rows"), self.label, strict=True)),
            "blocks": dict(self.blocks),
            "key": self.key,
            **{name: value for name, value in found.items() if name != "error"},
        }


def matrix_of(kernel: str, blocks: Mapping[str, int], arch: int) -> str | None:
    """The matrix instruction that a launch must use, or ``None``.

    Weights are the M operand of decode products, rows that of prompt products; WGMMA needs 64.
    """
    if kernel in PROMPTS:
        operand = blocks[PROMPTS[kernel]]
    elif kernel in PRODUCTS and blocks["BLOCK_N"] >= 16:
        operand = blocks["BLOCK_M"]
    else:
        return None
    by_arch = {90: "HGMMA", 100: "UTCHMMA"}
    return by_arch.get(arch, "HMMA") if operand >= 64 else "HMMA"


def faults_of(kernel: str, blocks: Mapping[str, int], arch: int, finding: Any) -> Iterator[str]:
    """What is wrong with a finding, one sentence each."""
    from fastskip.kernels.compilation import SHARED_LIMITS

    if finding.error is not None:
        yield finding.error.splitlines()[0]
        return
    if finding.spills:
        yield f"spills {finding.spills} bytes"
    if finding.shared > SHARED_LIMITS[arch]:
        yield f"needs {finding.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMITS[arch]}"
    if kernel in STREAMS and not finding.wide:
        yield "has no wide loads"
    if blocks.get("launch_pdl") and not finding.waits:
        yield "overlaps but never waits"
    if finding.early:
        yield f"touches memory or exits {finding.early} times before it waits"
    needed = matrix_of(kernel, blocks, arch)
    if needed is not None and needed not in finding.matrix:
        yield f"has no {needed} instruction"


def known(arch: int) -> dict[str, Any]:
    """The kept findings by the key of their source, without the sample to be compiled again."""
    from fastskip.kernels.compilation import Finding

    names = [each.name for each in fields(Finding) if each.name != "error"]
    return {
        row["key"]: Finding(**{name: row[name] for name in names})
        for row in _kept(arch)
        if "key" in row and int(row["key"][:8], 16) % ONE_IN
    }


def run(arch: int, *, again: bool = False) -> tuple[list[Compiled], list[str]]:
    """All kernels compiled for one architecture, and the table entries that no probe reached.

    ``again``: ignores kept findings.
    """
    from benchmarks import probes
    from fastskip.kernels import tuning
    from fastskip.kernels.compilation import build_of, compile_all
    from fastskip.ops.overlap import LEAST

    recorded = []
    missed = []
    for slug in TABLES.get(arch, (tuning.DEFAULT,)):
        found = list(probes.record(slug))
        overlapping = probes.record_overlapping(slug) if divmod(arch, 10) >= LEAST else ()
        recorded += [
            (slug, probed, build_of(probed.launch, arch)) for probed in (*found, *overlapping)
        ]
        missed += [f"table {slug}: {entry}" for entry in unreached(slug, found)]
    kept = {} if again else known(arch)
    findings = compile_all((build for _, _, build in recorded), known=kept)
    rows: dict[tuple[str, str], Compiled] = {}
    for slug, probed, build in recorded:
        blocks = probes.configuration(probed.launch)
        finding = findings[build.key]
        faults = tuple(faults_of(probed.launch.name, blocks, arch, finding))
        row = Compiled(
            slug,
            probed.probe,
            probed.launch.name,
            probed.model,
            probed.rows,
            blocks,
            finding,
            faults,
            build.key,
        )
        rows.setdefault((build.key, slug), row)  # one row for code shared by several calls
    return list(rows.values()), missed


def unreached(slug: str, found: Sequence[Any]) -> Iterator[str]:
    """Entries of table ``slug`` whose configuration no launch of their kernel has."""
    from fastskip.kernels import choice, guards, tuning

    for kernel, entries in tuning.read_table(slug).entries.items():
        if kernel in choice.TABLES:
            continue  # which way to compute a product, not a kernel
        launches = [
            probed.launch
            for probed in found
            if (
                probed.launch.is_guarded
                if kernel in guards.TABLES
                else probed.launch.name == kernel.removesuffix("_split").removesuffix("_half")
            )
        ]
        for entry in entries:
            wanted = entry.config.items()
            if not any(_agrees(wanted, launch) for launch in launches):
                yield f"{kernel} rows {entry.rows}, shape {entry.shape}: no probe reaches it"


def _agrees(wanted: Iterable[tuple[str, Any]], launch: Any) -> bool:
    """Whether a launch has this configuration; what only a launcher reads does not show in it."""
    given = {**launch.arguments, **launch.options}
    return all(given.get(name, value) == value for name, value in wanted)


def differences(new: Sequence[Row], old: Sequence[Row]) -> dict[tuple[Any, ...], str]:
    """Label -> what changed against the kept rows."""
    kept = {_label(row): row for row in old}
    changes = {}
    for row in new:
        before = kept.pop(_label(row), None)
        if before is None:
            changes[_label(row)] = "new"
            continue
        changed = [f"{name} was {before[name]}" for name in NUMBERS if before[name] != row[name]]
        if changed:
            changes[_label(row)] = ", ".join(changed)
    return changes | dict.fromkeys(kept, "gone")


def outdated(new: Sequence[Row], old: Sequence[Row]) -> Iterator[str]:
    """Kept findings that their source does not compile to, one line each."""
    kept = {row.get("key"): row for row in old}
    for row in new:
        before = kept.get(row["key"])
        if before is not None and any(before[name] != row[name] for name in NUMBERS):
            yield f"kept is {before}, compiled is {row}"


def _label(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("table", "probe", "kernel", "model", "rows"))


def _kept(arch: int) -> list[Row]:
    path = RESULTS / f"sm_{arch}.json"
    found: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    return found


def print_rows(arch: int, rows: Sequence[Compiled], changes: Mapping[Any, str]) -> None:
    """Prints one line per row."""
    table = Table(title=f"sm_{arch}", title_justify="left")
    for name in ("probe", "kernel", "model", "rows", "blocks"):
        table.add_column(name)
    for name in ("registers", "shared", "spills", "wide"):
        table.add_column(name, justify="right")
    for name in ("matrix", "faults", "against the kept"):
        table.add_column(name)
    for row in rows:
        found = row.finding
        table.add_row(
            f"{row.probe} ({row.table})",
            row.kernel,
            row.model,
            str(row.rows),
            " ".join(str(value) for value in row.blocks.values()),
            *(str(value) for value in (found.registers, found.shared, found.spills, found.wide)),
            " ".join(f"{name} {count}" for name, count in (found.matrix or {}).items()),
            "; ".join(row.faults),
            changes.get(row.label, ""),
        )
    CONSOLE.print(table)


def keep(arch: int, rows: Sequence[Compiled]) -> None:
    """Writes the rows, and a summary of all kept rows."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row.record) for row in sorted(rows, key=lambda row: row.label))
    (RESULTS / f"sm_{arch}.json").write_text(f"[\n{lines}\n]\n")
    parts = [
        "# What the kernels compile to",
        "Written by `python -m benchmarks.compile_gate --keep`. Each row gives the largest numbers "
        "over all configurations of a kernel: registers and spilled bytes per thread, shared "
        "memory per thread block.",
    ]
    for each in ARCHS:
        if kept := _kept(each):
            parts += [f"## sm_{each}", summary(kept)]
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per table and kernel."""
    lines = [
        "| table | kernel | compiled | registers | shared, KB | spills | matrix |",
        "|---|---|--:|--:|--:|--:|---|",
    ]

    def key(row: Row) -> tuple[str, str]:
        return row["table"], row["kernel"]

    for (table, kernel), group in groupby(sorted(rows, key=key), key=key):
        each = list(group)
        most = {name: max(row[name] for row in each) for name in ("registers", "shared", "spills")}
        names = sorted({name for row in each for name in row["matrix"] or ()})
        lines.append(
            f"| {table} | {kernel} | {len(each)} | {most['registers']} "
            f"| {most['shared'] / 1024:.0f} | {most['spills']} | {', '.join(names)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the gate; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name}/<arch>.json")
    parser.add_argument("--all", action="store_true", help="also print unchanged rows")
    parser.add_argument("--again", action="store_true", help="also compile kept kernels")
    options = parser.parse_args(arguments)
    wrong, start = 0, time.perf_counter()
    for arch in options.arch or ARCHS:
        rows, missed = run(arch, again=options.again)
        changes = differences([row.record for row in rows], _kept(arch))
        missed += outdated([row.record for row in rows], _kept(arch))
        print(f"sm_{arch}: {len(rows)} kernels\n")
        print(summary([row.record for row in rows]), end="\n\n")
        shown = [row for row in rows if options.all or row.faults or row.label in changes]
        if shown:
            print_rows(arch, shown, changes)
        gone = [label for label, change in changes.items() if change == "gone"]
        for label in gone:
            print(f"sm_{arch}: gone:", *label)
        for line in missed:
            print(f"sm_{arch}: {line}")
        wrong += len(missed) + sum(bool(row.faults) for row in rows)
        if options.keep:
            keep(arch, rows)
    print(f"{wrong or 'no'} faults, {time.perf_counter() - start:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    # Interpreted kernels cannot be compiled, and triton.jit decides that on import.
    if os.environ.pop("TRITON_INTERPRET", None):
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.compile_gate", *sys.argv[1:]])
    sys.exit(main())
