"""The end of a report: under what circumstances it was measured, and what it cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from fastskip.study.report.bench_file import BenchResult
from fastskip.study.report.blocks import Block, Facts, Heading, Points, Section
from fastskip.study.report.maps import Mapped
from fastskip.study.report.results import Results
from fastskip.study.report.search_file import SearchResult
from fastskip.wording import FEW_ITEMS, Scale, counted


def provenance(results: Results, made: str) -> Section:
    """Hardware, versions, dates and fingerprints of every result."""
    blocks: list[Block] = []
    for result in results.every:
        kind = type(result).__name__.removesuffix("Result").lower()
        blocks.append(Heading(f"{kind} in {result.source}"))
        facts = [*result.circumstances.lines()]
        if isinstance(result, SearchResult):
            facts += [
                (name.replace("_", " "), str(value)) for name, value in result.settings.items()
            ]
        elif isinstance(result, BenchResult):
            facts += _ceilings(result)
        blocks.append(Facts(tuple(facts)))
    blocks += [Heading("this report"), Facts((("made", made),))]
    return Section("provenance", "Under what circumstances", blocks)


def _ceilings(result: BenchResult) -> Iterator[tuple[str, str]]:
    if result.bandwidth is not None:
        yield "memory reaches", f"{result.bandwidth / 1e9:.3g} GB/s"
    if result.flops_rate is not None:
        yield "arithmetic reaches", f"{result.flops_rate / 1e9:.3g} GFLOP/s"


def limits(results: Results, mapped: list[Mapped]) -> Section:
    """What the numbers cannot say, told from the numbers themselves."""
    return Section("limits", "What this cannot say", (Points(tuple(_limits(results, mapped))),))


def _limits(results: Results, mapped: list[Mapped]) -> Iterator[str]:
    first, *rest = results.every
    if not all(first.circumstances.is_same_model(each.circumstances) for each in rest):
        names = dict.fromkeys(each.circumstances.model_name for each in results.every)
        told = "These results are not all of one model"
        yield f"{told} ({', '.join(names)}): do not compare across them."
    devices = {str(each.circumstances.told.get("device", "")) for each in results.every}
    if len(devices) > 1:
        yield f"Times are of different devices ({', '.join(sorted(devices))})."
    if results.evals or results.searches:
        yield (
            "Not told apart means that these items show no difference, not that there is none. "
            "Intervals are over items; where several are about one picture they are too narrow."
        )
    for run in results.evals:
        for part in run.parts:
            if len(part.items) < FEW_ITEMS:
                verb = "shows" if len(part.items) == 1 else "show"
                told = f"{counted(len(part.items), 'item')} ({run.source})"
                yield f"{told} {verb} large differences only."
            score = part.dense.score.mean
            if part.scale is Scale.CIDER:
                yield (
                    f"CIDEr is told times 100 ({run.source}): about 100 is what people's captions "
                    "reach among themselves, 1000 the most that there is."
                )
            elif score > 0.99:
                yield (
                    f"Dense scores {score:.1%} ({run.source}): nothing can be better, and harder "
                    "questions might lose more."
                )
        if run.dense.ttft_s is not None:
            yield (
                f"Times in {run.source} are medians of one item at batch 1, without an interval: "
                "small differences are noise. fastskip bench tells them apart."
            )
    if results.benches:
        yield (
            "Times are of one machine and one workload. Floors leave out the vision tower, norms "
            "and launches; on small models overhead, not work, is most of the time."
        )
    if results.searches:
        yield (
            "Candidates on the front were chosen by how they did; the best of many looks a little "
            "better than it is. Its score on other items is what counts."
        )
        yield "Sensitivity is of one cell alone; cells that are changed together interact."
    if any(each.found is None for each in mapped):
        yield "Some policies have no map: see there."
