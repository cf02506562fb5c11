"""Read and validate what `fastskip eval`, `bench` and `search` wrote into folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastskip.study.report.bench_file import BenchResult, read_bench
from fastskip.study.report.eval_file import EvalResult, read_eval
from fastskip.study.report.fields import Problem, ReportError
from fastskip.study.report.search_file import SearchResult, read_search

FILES = ("eval.json", "bench.json", "search.json")


@dataclass(frozen=True, slots=True)
class Results:
    """All results that go into a report, in the order of the folders."""

    evals: tuple[EvalResult, ...] = ()
    benches: tuple[BenchResult, ...] = ()
    searches: tuple[SearchResult, ...] = ()

    @property
    def every(self) -> tuple[EvalResult | BenchResult | SearchResult, ...]:
        """All results."""
        return (*self.searches, *self.evals, *self.benches)


def read_results(folders: Sequence[Path]) -> Results:
    """Read the results in these folders, each of which must hold one or more of `FILES`.

    Raises:
        ReportError: a folder has none, is named twice, or holds a file that cannot be used.
    """
    allowed = f"a folder that holds {' or '.join(FILES)}"
    if not folders:
        raise ReportError(Path("DIR"), "", Problem("none given"), allowed)
    seen: set[Path] = set()
    evals, benches, searches = [], [], []
    for folder in folders:
        if folder.resolve() in seen:
            raise ReportError(folder, "", Problem("named twice"), "each folder once")
        seen.add(folder.resolve())
        names = [name for name in FILES if (folder / name).is_file()]
        if not names:
            problem = "holds none of them" if folder.is_dir() else "no such folder"
            raise ReportError(folder, "", Problem(problem), allowed)
        if "eval.json" in names:
            evals.append(read_eval(folder))
        if "bench.json" in names:
            benches.append(read_bench(folder))
        if "search.json" in names:
            searches.append(read_search(folder))
    return Results(tuple(evals), tuple(benches), tuple(searches))
