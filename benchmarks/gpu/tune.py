"""Finds the fastest configurations: every kernel's candidates, timed at one model's shapes.

A question to the tuning tables consists of a kernel, a row count and a shape. Each operation is
timed with one question answered in different ways, and the answer with which the whole operation is
fastest goes into the tables. The way to compute a product is tuned too: the kernels of few rows,
the library, or the row GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.compiling import compile_ahead
from benchmarks.gpu.half_works import DECODE_HALVED
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Widths
from benchmarks.gpu.prefill_works import PREFILL
from benchmarks.gpu.results import Values
from benchmarks.gpu.routed_works import DECODE_ROUTED, PREFILL_ROUTED
from benchmarks.gpu.tables import Config, Question, write_tables
from benchmarks.gpu.timing import seconds
from benchmarks.gpu.works import DECODE, DECODE_ARRANGED, Work, on_own_memory
from fastskip.kernels import tuning
from fastskip.kernels.choice import TABLES
from fastskip.kernels.launch import recording

Answer = Mapping[str, Any]
"""A configuration and its measured performance."""
PROMISING = 1.6
"""A way to compute a product is not tuned if, untuned, it takes this many times the least."""
TINY_CANDIDATES = 2
REPLAYS = 5


def tune(setting: Setting, widths: Widths, rows: int) -> Values:
    """Times the candidates of all kernels; ``rows`` 0 stands for the rows of a prompt."""
    widths = TINY if setting.is_tiny else widths
    decode = DECODE | DECODE_ARRANGED | DECODE_HALVED | DECODE_ROUTED
    works = decode if rows else PREFILL | PREFILL_ROUTED
    if setting.is_tiny:  # every operation takes seconds in the interpreter
        works = dict(list(works.items())[::3])
    rows = rows or widths.context
    found: dict[str, Any] = {}
    answered: dict[Question, Answer] = {}
    failures: dict[str, str] = {}
    for name, maker in works.items():
        if setting.seconds_left < 0:
            failures[name] = "no time was left"
            continue
        try:
            new = _tune_work(setting, on_own_memory(maker, widths, rows, setting), answered)
        except Exception as error:
            if is_lost(setting.device):
                raise
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        answered |= new
        write_tables(setting, new)  # now: a later candidate may hang, or lose the device
        found |= {f"{q.kernel}, {q.rows} rows ({name})": best for q, best in new.items()}
    if failures and not found:
        raise RuntimeError("\n".join(f"{name}: {fault}" for name, fault in failures.items()))
    return {"widths": widths.name, "kernels": found, "failures": failures}


def _tune_work(
    setting: Setting, works: Sequence[Work], answered: Mapping[Question, Answer]
) -> dict[Question, Answer]:
    """Tunes the questions that one operation asks; ``works`` differ only in their memory.

    The first question is which way to compute a product, and later questions depend on its answer:
    each way that may turn out fastest is tuned before one is chosen.
    """
    usual = asked_by(works[0], _configs(answered))
    choices = [each for each in usual if each.kernel in TABLES and each not in answered]
    if not choices:
        return _tune_kernels(setting, works, answered)
    choice = choices[0]
    ways = candidates_of(choice, usual[choice])
    calls = [partial(_run, works[0], {**_configs(answered), choice: way}) for way in ways]
    compile_ahead(calls, setting.device)
    times, faults = _times(setting, works, answered, choice, ways)
    _check_timed(choice, times, faults)
    least = min(time for time, _ in times)
    known = dict(answered)
    for time, way in times:
        if time <= PROMISING * least:
            chosen = {**known, choice: {"config": way}}
            known |= _tune_kernels(setting, works, chosen)
    tuned, faults = _times(setting, works, known, choice, [way for _, way in times])
    known[choice] = _best(tuned or times, usual[choice], len(ways), works[0], setting, faults)
    # A work may ask for more than one choice.
    known |= _tune_work(setting, works, known)
    return {question: answer for question, answer in known.items() if question not in answered}


def _tune_kernels(
    setting: Setting, works: Sequence[Work], answered: Mapping[Question, Answer]
) -> dict[Question, Answer]:
    """Tunes the kernels that a work launches under the answers so far.

    A question may depend on the answer to an earlier one: block sizes determine partial results.
    """
    found: dict[Question, Answer] = {}
    while True:
        known = {**answered, **found}
        asked = asked_by(works[0], _configs(known))
        open_ones = (
            (question, current, configs)
            for question, current in asked.items()
            if question not in known and question.kernel not in TABLES
            if (configs := candidates_of(question, current))
        )
        first = next(open_ones, None)
        if first is None:
            return found
        question, current, configs = first
        configs = configs[:TINY_CANDIDATES] if setting.is_tiny else configs
        calls = [partial(_run, works[0], {**_configs(known), question: each}) for each in configs]
        compile_ahead(calls, setting.device)
        times, faults = _times(setting, works, known, question, configs)
        _check_timed(question, times, faults)
        found[question] = _best(times, current, len(configs), works[0], setting, faults)


def _times(
    setting: Setting,
    works: Sequence[Work],
    answered: Mapping[Question, Answer],
    question: Question,
    configs: Sequence[Config],
) -> tuple[list[tuple[float, Config]], list[str]]:
    """Seconds of a call with each answer to ``question``, and why some did not run."""
    times: list[tuple[float, Config]] = []
    faults: list[str] = []
    for config in configs:
        if times and setting.seconds_left < 0:
            break
        answers = {**_configs(answered), question: config}
        try:
            calls = [partial(_run, work, answers) for work in works]
            times.append((seconds(calls, setting.device, REPLAYS), config))
        except Exception as error:
            if is_lost(setting.device):
                raise
            faults.append(f"{dict(config)}: {type(error).__name__}: {error}"[:300])
    return times, faults


def _check_timed(question: Question, times: Sequence[object], faults: Sequence[str]) -> None:
    if not times:
        raise RuntimeError(f"{question}: nothing was timed: {faults[:1] or 'no time was left'}")


def _best(
    times: Sequence[tuple[float, Config]],
    current: Config,
    offered: int,
    work: Work,
    setting: Setting,
    faults: list[str],
) -> Answer:
    fastest, config = min(times, key=lambda pair: pair[0])
    slowest, _ = max(times, key=lambda pair: pair[0])
    before = next((time for time, each in times if each == current), None)
    return {
        "config": dict(config),
        "us": 1e6 * fastest,
        "gb_per_s": work.nbytes / fastest / 1e9,
        "share_of_floor": work.floor_seconds(ceilings_of(setting)) / fastest,
        "us_before": None if before is None else 1e6 * before,
        "us_slowest": 1e6 * slowest,
        "timed": f"{len(times)} of {offered}",
        "faults": faults,
    }


def candidates_of(question: Question, current: Config) -> list[Config]:
    """The configuration in use, then the candidates that the kernel's module offers for it.

    A module may hold several kernels; its candidates are for those with the same block sizes.
    Tables beside a kernel's own have candidates under the table's name, or use all of their
    module's.
    """
    offered = []
    for file in sorted(tuning.FOLDER.parent.glob("*.py")):
        module = import_module(f"fastskip.kernels.{file.stem}")
        named = f"{question.kernel}_candidates"
        if hasattr(module, named):
            offered += getattr(module, named)(question.rows, question.shape)
        elif not hasattr(module, "candidates"):
            continue
        elif question.kernel in getattr(module, "TABLES", ()):
            offered += module.candidates(question.rows, question.shape)
        elif hasattr(module, f"_{question.kernel}_kernel"):
            found = module.candidates(question.rows, question.shape)
            offered += [config for config in found if _blocks(config) == _blocks(current)]
    return [current, *(config for config in offered if config != current)] if offered else []


def _blocks(config: Config) -> set[str]:
    return {name for name in config if name.startswith("BLOCK")}


def asked_by(work: Work, answers: Mapping[Question, Config]) -> dict[Question, Config]:
    """The questions that the work asks the tables, with the answers it gets; nothing runs."""
    with answering(answers) as asked, recording(is_dry=True):
        work.run(_compiled())
    return asked


def _run(work: Work, answers: Mapping[Question, Config]) -> None:
    with answering(answers):
        work.run(_compiled())


def _configs(answers: Mapping[Question, Answer]) -> dict[Question, Config]:
    return {question: answer["config"] for question, answer in answers.items()}


def _compiled() -> Any:
    from fastskip.ops import compiled

    return compiled


@contextmanager
def answering(answers: Mapping[Question, Config]) -> Iterator[dict[Question, Config]]:
    """Within this block the tables give these answers; yields the questions asked, with answers."""
    asked: dict[Question, Config] = {}
    usual: Callable[..., Config] = tuning.config_for

    def config_for(
        kernel: str, device: torch.device, rows: int, shape: tuple[int, ...] = ()
    ) -> Config:
        question = Question(kernel, rows, shape)
        found = answers.get(question) or usual(kernel, device, rows, shape)
        asked[question] = dict(found)
        return asked[question]

    tuning.config_for = config_for
    try:
        yield asked
    finally:
        tuning.config_for = usual


def _cell(widths: Widths, rows: int, is_default: bool) -> Cell:
    name = f"tune.{widths.name}.{f'b{rows}' if rows else 'prefill'}"
    what = f"decode at batch {rows}" if rows else "prefill of one prompt"
    about = f"fastest configurations for {what}, {widths.name.upper()} shapes"
    minutes = 1.9 if rows else 1.6
    return Cell(name, about, minutes, partial(tune, widths=widths, rows=rows), is_default)


CELLS = [
    _cell(widths, rows, widths is SEVEN and rows in (1, 16, 0))
    for widths in (SEVEN, THIRTEEN)
    for rows in (1, 16, 0, 4, 64)
]
