"""The report of some folders' results: one page, and its pictures beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastskip.study.report import closing, sections
from fastskip.study.report.blocks import Section
from fastskip.study.report.drawing import require
from fastskip.study.report.fields import Problem, ReportError
from fastskip.study.report.maps import Mapped, ShapeOf, maps
from fastskip.study.report.page import render
from fastskip.study.report.results import Results, read_results
from fastskip.whole_files import whole_file

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
    """Write the page and its pictures; returns their paths, the page first.

    Args:
        folders: each holds `eval.json`, `bench.json` or `search.json`, one of them or more.
        out: the page; what is there is replaced when all is drawn.
        pngs: the folder of the pictures.
        shape_of: the shape of a result's model, `None` where it is not known.
        layers: of such a model; without them it has no maps.
        examples: items at the most, of each `eval.json`.
        made: the date in the page; now, if none is given.
        on_part: called with the name of each section before it is drawn.
    Raises:
        ReportError: a file or folder cannot be used, or a model is known to have other layers.
        DrawingError: matplotlib is missing.
    """
    require()
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
        with whole_file(out) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        problem = Problem(f"cannot be written ({error})")
        raise ReportError(out, "", problem, "a place to write to") from error
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
