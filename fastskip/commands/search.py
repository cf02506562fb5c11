"""`fastskip search`: the best policy for a model on this machine under a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageFolderOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    checkpoint,
    config_of,
    dtype_for,
    load_plain,
    prepare,
)
from fastskip.commands.demo_items import demo_tasks
from fastskip.commands.exams import (
    AnswerTokensOption,
    ItemsOption,
    PromptsOption,
    TimedTokensOption,
    check_sources,
    exam_of,
    first_of,
)
from fastskip.commands.outputs import check_folder
from fastskip.commands.search_table import show
from fastskip.json_file import json_text
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.study.evaluation.exam import Exam
    from fastskip.study.evaluation.items import Item
    from fastskip.study.search import Watcher

CALIBRATION_SEED = 5
"""First seed of the demo's calibration questions; its held-out ones use 0."""


def search(
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help='"tpot 1.5x" or "ttft 1.3x": that many times as fast as dense here; "ttft 80ms": '
            'at most that long; "flops 0.7": at most this share of the dense FLOPs.',
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder for search.json, policies/*.json (replacing an older search's), plots and "
            "all measurements, from which an interrupted run resumes.",
        ),
    ],
    model: ModelOption = None,
    items: ItemsOption = None,
    images: ImageFolderOption = None,
    calibration: Annotated[
        int, typer.Option(min=1, metavar="N", help="Calibration items: the search sees these only.")
    ] = 32,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of held-out items, which judge.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all random draws.")] = 0,
    tries: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Policies measured to refine the solver's solution."),
    ] = 80,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MIN",
            help="Stop refining after this long; the result then depends on the machine's speed.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(min=0, metavar="N", help="Milder budgets to solve as well.")
    ] = 2,
    random_policies: Annotated[
        int, typer.Option(min=0, metavar="N", help="Random policies to compare with.")
    ] = 3,
    multi_turn: Annotated[
        bool,
        typer.Option(
            "--multi-turn",
            help="Keep answers visible to later turns on a kept cache: generated rows store K and "
            "V even where they skip attention, which costs time.",
        ),
    ] = False,
    no_routers: Annotated[
        bool, typer.Option("--no-routers", help="Do not calibrate routers as candidates.")
    ] = False,
    batch: PromptsOption = 16,
    answer_tokens: AnswerTokensOption = 32,
    new_tokens: TimedTokensOption = 16,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs per policy.")] = 5,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the best policy for a model on this machine under a budget, and tell if it is worth it.

    Skips each part of each layer in turn, one token class at a time, and measures how far the dense
    model's answers move; chooses by mixed-integer programming what moves them least within the
    budget; refines the solution by measuring whole policies. Costs come from the plan, times from a
    fit to policies timed here. Uniform intervals, random policies, published methods and calibrated
    routers get the same budget, and all candidates answer items that the search did not see. The
    recommended policy keeps the budget as measured and is not shown to be worse than dense; if
    there is none, the command says so.

    [bold]Examples[/]

    [cyan]fastskip search --budget "flops 0.6" -o runs/search[/] # the demo's model, minutes

    [cyan]fastskip search -m llava-hf/llava-1.5-7b-hf --items vqa.jsonl --budget "ttft 1.5x"
    -o runs/search[/]
    """
    prepare(threads)
    check_folder("--out", out)
    check_sources(model, items, images)
    from fastskip import plotting
    from fastskip.study.evaluation.metrics import scale_of
    from fastskip.study.search import Search, SearchSettings, parse_budget, plots
    from fastskip.study.search.hidden_states import compared
    from fastskip.study.search.solver import require

    require()
    wanted = parse_budget(budget)
    settings = SearchSettings(
        seed=seed,
        tries=tries,
        points=points,
        minutes=minutes,
        new_tokens=new_tokens,
        rounds=rounds,
        randoms=random_policies,
        keeps_answers=multi_turn,
        routers=not no_routers,
    )
    path = checkpoint(model)
    seen, others = _parted(items, images, calibration, count, seed)
    scale_of(item.metric for item in others)
    exam, held_out = (_exam(each, path, batch, answer_tokens) for each in (seen, others))

    import fastskip
    from fastskip.machine import ceilings

    # Hidden states are compared on the unprepared model.
    plain = load_plain(path, config_of(path), dtype_for(model, dtype), device)
    watcher, close = _bars()
    alike = compared(plain, exam, out, watcher)
    prepared = fastskip.apply_(plain, "dense")
    try:
        result = Search(
            prepared,
            wanted,
            exam,
            held_out,
            ceilings(prepared.dtype, prepared.device),
            similarity=alike,
            settings=settings,
            folder=out,
            watcher=watcher,
        ).run()
    finally:
        close()
    if plotting.is_available():
        plots.write(result, out)
    if as_json:
        typer.echo(json_text(result.to_dict(), indent=2))
    else:
        show(result)
        typer.echo(f"wrote {out}", err=True)


def _parted(
    file: Path | None, images: Path | None, calibration: int, count: int, seed: int
) -> tuple[list["Item"], list["Item"]]:
    """Items to calibrate on, and held-out ones to judge by."""
    import random

    from fastskip.study.evaluation.items import ItemError, read_items
    from fastskip.study.fingerprints import items_fingerprint

    if file is None:
        held_out = demo_tasks(count)
        known = {items_fingerprint([each]) for each in held_out}
        seen = demo_tasks(calibration, CALIBRATION_SEED + seed)
        return [each for each in seen if items_fingerprint([each]) not in known], held_out
    every = read_items(file, images)
    if len(every) <= calibration:
        raise ItemError(
            f"--items {file}: {counted(len(every), 'item')}; allowed: more than the {calibration} "
            "that --calibration takes, as the rest is held out"
        )
    order = list(range(len(every)))
    random.Random(seed).shuffle(order)
    shuffled = [every[place] for place in order]
    return shuffled[:calibration], shuffled[calibration:][:count]


def _exam(items: list["Item"], path: str, batch: int, answer_tokens: int) -> "Exam":
    """The items as inputs; raises on a broken one before anything is measured."""
    exam = exam_of(items, path, batch, answer_tokens)
    broken = list(exam.problems().values())
    if broken:
        raise first_of(broken)
    return exam


def _bars() -> tuple["Watcher", Any]:
    """A watcher with a progress bar for each stage, and what closes the last bar."""
    from tqdm import tqdm

    from fastskip.study.search import Watcher

    bars: list[Any] = []

    def close() -> None:
        while bars:
            bars.pop().close()

    def on_stage(stage: str, steps: int | None) -> None:
        close()
        bars.append(tqdm(total=steps, desc=stage, disable=None))

    def on_step() -> None:
        if bars:
            bars[-1].update()

    return Watcher(on_stage, on_step), close
