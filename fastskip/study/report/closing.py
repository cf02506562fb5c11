"""The end of a report: the measurement conditions, and the limitations."""

from __future__ import annotations

from collections.abc import Iterator

from fastskip.study.report.bench_file import BenchResult
from fastskip.study.report.blocks import Block, Facts, Heading, Points, Section
from fastskip.study.report.maps import Mapped
from fastskip.study.report.results import Results
from fastskip.study.report.search_file import SearchResult
from fastskip.wording import FEW_ITEMS, Scale, counted, significant


def provenance(results: Results, made: str) -> Section:
    """Hardware, versions, dates and fingerprints of each result."""
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
    return Section("provenance", "Measurement conditions", blocks)


def _ceilings(result: BenchResult) -> Iterator[tuple[str, str]]:
    if result.bandwidth is not None:
        yield "memory bandwidth ceiling", f"{significant(result.bandwidth / 1e9)} GB/s"
    if result.flops_rate is not None:
        yield "arithmetic ceiling", f"{significant(result.flops_rate / 1e9)} GFLOP/s"


def limits(results: Results, mapped: list[Mapped]) -> Section:
    """What these numbers cannot show, derived from the numbers themselves."""
    return Section("limits", "Limitations", (Points(tuple(_limits(results, mapped))),))


def _limits(results: Results, mapped: list[Mapped]) -> Iterator[str]:
    first, *rest = results.every
    if not all(first.circumstances.is_same_model(each.circumstances) for each in rest):
        names = dict.fromkeys(each.circumstances.model_name for each in results.every)
        yield (
            f"These results are from different models ({', '.join(names)}): do not compare across "
            "models."
        )
    devices = {str(each.circumstances.told.get("device", "")) for each in results.every}
    if len(devices) > 1:
        yield f"Times were taken on different devices ({', '.join(sorted(devices))})."
    if results.evals or results.searches:
        yield (
            '"Not told apart" means that these items show no difference, not that there is none. '
            "Intervals are over items; they are too narrow if several items share an image."
        )
    for run in results.evals:
        for part in run.parts:
            if len(part.items) < FEW_ITEMS:
                yield (
                    f"{counted(len(part.items), 'item')} ({run.source}) can reveal only large "
                    "differences."
                )
            score = part.dense.score.mean
            if part.scale is Scale.CIDER:
                yield (
                    f"CIDEr is reported times 100 ({run.source}): human captions score about 100 "
                    "against each other; the maximum is 1000."
                )
            elif score > 0.99:
                yield (
                    f"Dense scores {score:.1%} ({run.source}): there is no headroom above it, and "
                    "harder questions might lose more."
                )
        if run.dense.ttft_s is not None:
            yield (
                f"Times in {run.source} are medians on one item at batch 1, without intervals: "
                "small differences may be noise. Use fastskip bench to resolve them."
            )
    if results.benches:
        yield (
            "Times hold for one machine and one workload. Floors exclude the vision tower, norms "
            "and kernel launches; on small models, overhead dominates the time."
        )
    if results.searches:
        yield (
            "Candidates on the front were selected by their scores, so the best of many looks "
            "slightly better than it is. Its score on fresh items is what counts."
        )
        yield "Sensitivity is measured one cell at a time; cells changed together interact."
    if any(each.found is None for each in mapped):
        yield 'Some policies have no map; "What each policy runs" says why.'
