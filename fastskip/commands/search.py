"""`fastskip search`: the best policy for a model, this machine and a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
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
    ImageFolderOption,
    ItemsOption,
    PromptsOption,
    check_sources,
    exam_of,
    first_of,
)
from fastskip.commands.outputs import check_folder
from fastskip.commands.search_table import show
from fastskip.study.json_file import json_text
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.study.evaluation import Exam
    from fastskip.study.items import Item
    from fastskip.study.search import Watcher

CALIBRATION_SEED = 5
"""The demo's calibration questions are drawn by seeds from here on, its held-out ones by 0."""


def search(
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help='"tpot 1.5x" or "ttft 1.3x": so many times faster than dense here; "ttft 80ms": '
            'at the most; "flops 0.7": this share of the dense FLOPs.',
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where search.json, policies/*.json (in place of an older search's) and plots go, "
            "and what was measured, so that a run that was cut off goes on from there.",
        ),
    ],
    model: ModelOption = None,
    items: ItemsOption = None,
    images: ImageFolderOption = None,
    calibration: Annotated[
        int, typer.Option(min=1, metavar="N", help="Items that the search sees.")
    ] = 32,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Held-out items that judge, at the most.")
    ] = 200,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of all that is drawn; the same gives the same.")
    ] = 0,
    tries: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Policies measured to better what the solver found."),
    ] = 80,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MIN",
            help="End the bettering after so long; the result then depends on the machine's speed.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(min=0, metavar="N", help="Milder budgets to search for too.")
    ] = 2,
    randoms: Annotated[int, typer.Option(min=0, metavar="N", help="Random policies.")] = 3,
    multi_turn: Annotated[
        bool,
        typer.Option(
            "--multi-turn",
            help="Answers stay visible to later turns on a kept cache: where their rows skip "
            "attention they leave K and V all the same, which costs time.",
        ),
    ] = False,
    no_routers: Annotated[
        bool, typer.Option("--no-routers", help="Do not calibrate routers as candidates.")
    ] = False,
    batch: PromptsOption = 16,
    answer_tokens: AnswerTokensOption = 32,
    new_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens of the call that is timed.")
    ] = 16,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs of each.")] = 5,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print search.json instead.")] = False,
) -> None:
    """Find the best policy for a model on this machine under a budget, and say if it is worth it.

    Leaves out every part of every layer once, class by class, and sees how far the dense model's
    answers move; takes by mixed-integer programming what costs least under the budget; betters
    that by measuring whole policies. Costs come from the plan, times from a fit to policies timed
    here. Uniform intervals, random policies, published methods and calibrated routers are held to
    the same budget, and all answer items that the search did not see. What is recommended keeps the
    budget as measured and is not told to be worse than dense; if nothing is, it says so.

    [bold]Examples[/]

    [cyan]fastskip search --budget "flops 0.6" --out runs/search[/] (the demo's model, some minutes)

    [cyan]fastskip search -m llava-hf/llava-1.5-7b-hf --items vqa.jsonl --budget "ttft 1.5x"
    --out runs/search --dtype bfloat16[/]
    """
    prepare(threads)
    check_folder("--out", out)
    check_sources(model, items, images)
    from fastskip.study.metrics import scale_of
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
        randoms=randoms,
        keeps_answers=multi_turn,
        routers=not no_routers,
    )
    path = checkpoint(model)
    seen, others = _parted(items, images, calibration, count, seed)
    scale_of(item.metric for item in others)
    exam, held_out = (_exam(each, path, batch, answer_tokens) for each in (seen, others))

    import fastskip
    from fastskip.machine import ceilings

    # Hidden states are compared before it is prepared.
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
    if plots.is_available():
        plots.write(result, out)
    if as_json:
        typer.echo(json_text(result.to_dict(), indent=2))
    else:
        show(result)
        typer.echo(f"wrote {out}", err=True)


def _parted(
    file: Path | None, images: Path | None, calibration: int, count: int, seed: int
) -> tuple[list["Item"], list["Item"]]:
    """Items to calibrate on, and others to judge by."""
    import random

    from fastskip.study.fingerprints import items_fingerprint
    from fastskip.study.items import ItemError, read_items

    if file is None:
        held_out = demo_tasks(count)
        known = {items_fingerprint([each]) for each in held_out}
        seen = demo_tasks(calibration, CALIBRATION_SEED + seed)
        return [each for each in seen if items_fingerprint([each]) not in known], held_out
    every = read_items(file, images)
    if len(every) <= calibration:
        raise ItemError(
            f"--items {file}: {counted(len(every), 'item')}; allowed: more than the {calibration} "
            "that --calibration takes, since others judge"
        )
    order = list(range(len(every)))
    random.Random(seed).shuffle(order)
    shuffled = [every[place] for place in order]
    return shuffled[:calibration], shuffled[calibration:][:count]


def _exam(items: list["Item"], path: str, batch: int, answer_tokens: int) -> "Exam":
    """The items as inputs; a broken one is found before anything is measured."""
    exam = exam_of(items, path, batch, answer_tokens)
    broken = list(exam.problems().values())
    if broken:
        raise first_of(broken)
    return exam


def _bars() -> tuple["Watcher", Any]:
    """A bar for each stage, with the time that it has left; and what ends the last one."""
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
