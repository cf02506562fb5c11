"""The sections of a report, each built from the results that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastskip.intervals import SpeedVerdict, Verdict
from fastskip.study.report.accuracy_chart import accuracy_chart
from fastskip.study.report.blocks import Block, Cell, Figure, Heading, Points, Section, Table, Text
from fastskip.study.report.cost_chart import cost_chart
from fastskip.study.report.examples import differences_table, examples
from fastskip.study.report.heat_chart import heat_chart
from fastskip.study.report.joining import TimedPoints, eval_points, search_points, workload_text
from fastskip.study.report.maps import Mapped
from fastskip.study.report.policy_chart import policy_chart
from fastskip.study.report.results import Results
from fastskip.study.report.tables import (
    bench_table,
    eval_table,
    floor_table,
    kinds_table,
    left_out_table,
    rivals_table,
    search_table,
    sensitivity_tables,
    speedup_text,
)
from fastskip.wording import Scale, counted


def summary(results: Results) -> Section:
    """The main findings, in a few lines; empty if there are none."""
    findings = tuple(_findings(results))
    return Section("summary", "Summary", (Points(findings),) if findings else ())


def _findings(results: Results) -> Iterator[str]:
    for search in results.searches:
        yield f"Search ({search.budget}): {search.conclusion}"
    for part in (part for run in results.evals for part in run.parts):
        is_share = part.scale is Scale.SHARE
        groups: dict[Verdict, list[str]] = {}
        for each in part.judged[1:]:
            change = each.minus(part.dense)
            text = f"{each.label} ({change.in_points[0]}{' points' if is_share else ''})"
            groups.setdefault(Verdict.of(change), []).append(text)
        what = "Answers" if is_share else f"Captions by {part.scale.axis}"
        for verdict in Verdict:
            if verdict in groups:
                against = "from dense" if verdict is Verdict.NOT_TOLD_APART else "than dense"
                names, items = ", ".join(groups[verdict]), counted(len(part.items), "item")
                yield f"{what} ({items}) {verdict} {against}: {names}."
    for bench in results.benches:
        for found in (SpeedVerdict.FASTER, SpeedVerdict.SLOWER):
            ratios = [
                f"{contender.label} ({quantity.upper()} {speedup_text(timed.speedup[quantity])})"
                for quantity in ("ttft", "tpot")
                for contender, timed in bench.timed
                if timed.verdict.get(quantity) is found and quantity in timed.speedup
            ]
            if ratios:
                which, what = found.capitalize(), ", ".join(ratios)
                yield f"{which} here than fastskip's own dense model: {what}."


def search_section(results: Results) -> Section:
    """Recommendation, candidates and sensitivity."""
    blocks: list[Block] = []
    for number, search in enumerate(results.searches, start=1):
        blocks += _titled(search.source, len(results.searches))
        blocks += [
            Text(f"Budget: {search.budget}. Recommended: {search.recommended or 'nothing'}.")
        ]
        blocks += _charts(f"search{number}", search_points(search), search.scale)
        if search.candidates:
            blocks.append(search_table(search))
        if search.rivals:
            blocks.append(rivals_table(search))
        if search.left_out:
            blocks.append(left_out_table(search))
        if search.sensitivity:
            chart = heat_chart(f"search{number}_sensitivity", search.sensitivity)
            caption = (
                "Sensitivity: how far the answer distribution moves from dense (KL) if this one "
                "cell alone is changed. Cells high on the scale are best left running."
            )
            blocks += [Figure(chart, caption), *sensitivity_tables(search)]
    return Section("search", "Search under a budget", blocks)


def eval_section(results: Results) -> Section:
    """Charts of scores against times, and their tables."""
    blocks: list[Block] = []
    for number, run in enumerate(results.evals, start=1):
        blocks += _titled(run.source, len(results.evals))
        for part in run.parts:
            name = f"eval{number}"
            if len(run.parts) > 1:
                name += f"_{part.scale}"
                blocks.append(Heading(f"{part.scale.heading}, {counted(len(part.items), 'item')}"))
            blocks += _charts(name, eval_points(part, results.benches), part.scale)
            blocks.append(eval_table(part))
            kinds = kinds_table(part)
            blocks += [] if kinds is None else [kinds]
    return Section("accuracy", "Accuracy against time", blocks)


def bench_section(results: Results) -> Section:
    """Times, verdicts and floors."""
    blocks: list[Block] = []
    for number, bench in enumerate(results.benches, start=1):
        blocks += _titled(bench.source, len(results.benches))
        blocks.append(Text(f"{bench.circumstances.model_name}: {workload_text(bench)}."))
        caption = (
            "Bars: median time of the prefill and of one decode step, with quartiles. Vertical "
            "line: the floor. A floor above a measured time means that the ceilings were measured "
            "while the machine was disturbed."
        )
        blocks.append(Figure(cost_chart(f"bench{number}_cost", bench), caption))
        floors = floor_table(bench)
        blocks += [bench_table(bench), *([] if floors is None else [floors])]
        if bench.left_out:
            blocks.append(
                Points(tuple(f"{c.label}: left out ({c.left_out})" for c in bench.left_out))
            )
    return Section("cost", "Cost against the floor", blocks)


def maps_section(mapped: Sequence[Mapped]) -> Section:
    """What each policy runs."""
    blocks: list[Block] = [
        Text(
            "Each box is one layer and one token class: image, other prompt text, or generated. "
            "Its upper half is attention, its lower half the FFN. Coloured: it runs; hatched: a "
            "router decides row by row; empty: it is skipped. A mark in an empty upper half: rows "
            "that skip attention still store an entry in the layer's KV cache. Two strokes above a "
            "layer: attention and FFN run in parallel on the same input; a bracket: two layers run "
            "on the same input. Red line: rows are removed there, and later boxes are filled to "
            "the share that stays. Dense runs everything."
        )
    ]
    for number, each in enumerate((one for one in mapped if one.found is not None), start=1):
        assert each.found is not None
        caption = "; ".join(removal.text for removal in each.found.removals)
        chart = policy_chart(f"policy{number}", each.label, each.found)
        blocks += [Heading(each.label), Figure(chart, caption)]
        rows = tuple(
            (Cell(line.layers), Cell(line.arrangement), *map(Cell, line.cells))
            for line in each.found.lines
        )
        title, head = f"{each.label} in words", ("layers", "arrangement", *each.found.classes)
        blocks.append(Table(title, head, rows, name_at=0, has_numbers=False, is_folded=True))
    missing = tuple(f"{each.label}: no map ({each.problem})" for each in mapped if not each.found)
    if missing:
        blocks.append(Points(missing))
    return Section("policies", "What each policy runs", blocks)


def examples_section(results: Results, most: int) -> Section:
    """Answers that differ from dense."""
    blocks: list[Block] = []
    for run in results.evals:
        if len(run.judged) < 2:
            continue
        blocks += _titled(run.source, len(results.evals))
        blocks.append(differences_table(run))
        found = examples(run, most)
        blocks += found
        if found:
            text = (
                f"{counted(len(found), 'item')} on which answers differ, each policy's greatest "
                "losses first: not a representative sample; for that, see the table above."
            )
            blocks.insert(len(blocks) - len(found), Text(text))
        else:
            blocks.append(Text("No policy answers any item differently from dense."))
    return Section("examples", "Where answers differ", blocks)


def _charts(name: str, found: Sequence[TimedPoints], scale: Scale) -> list[Block]:
    blocks: list[Block] = []
    for each in found:
        own = f"{name}_{each.quantity.lower()}"
        chart = accuracy_chart(own, each.quantity, each.points, scale)
        caption = (
            f"Score against {each.quantity.value}. Vertical bars: 95 % intervals over items; "
            f"dotted lines: dense; numbers: rows of the table. {each.quantity.value}: {each.times}."
        )
        blocks.append(Figure(chart, caption))
    if not blocks:
        blocks.append(Text("No scored policy was timed, so there is no chart."))
    return blocks


def _titled(source: str, count: int) -> list[Block]:
    return [Heading(source)] if count > 1 else []
