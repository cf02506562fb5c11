"""Write the report of some folders' results: one page, and its charts as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastskip.atomic_files import atomic_write
from fastskip.plotting import require
from fastskip.study.report import closing, sections
from fastskip.study.report.blocks import Section
from fastskip.study.report.fields import Problem, ReportError
from fastskip.study.report.maps import Mapped, ShapeOf, maps
from fastskip.study.report.page import render
from fastskip.study.report.results import Results, read_results

EXAMPLES = 12


def write_report(
    folders: Sequence[Path],
    out: Path,
    pngs: Path,
    shape_of: ShapeOf,
    *,
    layers: int | None = None,
    examples: int = EXAMPLES,
    made: str | None = None,
    on_part: Callable[[str], object] = lambda name: None,
) -> list[Path]:
    """Write the page and its charts; returns their paths, the page first.

    Args:
        folders: each holds one or more of `eval.json`, `bench.json` and `search.json`.
        out: the page; an existing file is replaced once everything is drawn.
        pngs: the folder for the charts.
        shape_of: the shape of a result's model, `None` if unknown.
        layers: the depth of models whose shape is unknown; without it, they have no maps.
        examples: maximum number of example items per `eval.json`.
        made: the date shown on the page; by default, now.
        on_part: called with the name of each section before it is drawn.
    Raises:
        ReportError: a file or folder cannot be used, or `layers` contradicts a model's known depth.
        PlotsError: matplotlib is missing.
    """
    require("report")
    results = read_results(folders)
    made = made or datetime.now(UTC).isoformat(timespec="seconds")
    mapped = maps(results, shape_of, layers)
    parts = _sections(results, mapped, examples, made, on_part)
    names = dict.fromkeys(each.circumstances.model_name for each in results.every)
    page = render("fastskip report", f"{', '.join(names)}; {made}", parts)
    try:
        pngs.mkdir(parents=True, exist_ok=True)
        drawn = [each for part in parts for each in part.pictures]
        for each in drawn:
            (pngs / f"{each.name}.png").write_bytes(each.png)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        problem = Problem(f"cannot be written ({error})")
        raise ReportError(out, "", problem, "a writable path") from error
    return [out, *(pngs / f"{each.name}.png" for each in drawn)]


def _sections(
    results: Results,
    mapped: list[Mapped],
    examples: int,
    made: str,
    on_part: Callable[[str], object],
) -> list[Section]:
    makers: dict[str, Callable[[], Section]] = {"summary": lambda: sections.summary(results)}
    if results.searches:
        makers["search"] = lambda: sections.search_section(results)
    if results.evals:
        makers["accuracy"] = lambda: sections.eval_section(results)
    if results.benches:
        makers["cost"] = lambda: sections.bench_section(results)
    if mapped:
        makers["policies"] = lambda: sections.maps_section(mapped)
    if results.evals and examples:
        makers["examples"] = lambda: sections.examples_section(results, examples)
    makers["provenance"] = lambda: closing.provenance(results, made)
    makers["limits"] = lambda: closing.limits(results, mapped)
    found = []
    for name, make in makers.items():
        on_part(name)
        found.append(make())
    return found
