"""`fastskip eval`: what policies cost in answer quality and gain in time, on your own items."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageFolderOption,
    JsonOption,
    ModelOption,
    PoliciesOption,
    ThreadsOption,
    checkpoint,
    dtype_for,
    load,
    named_policies,
    prepare,
)
from fastskip.commands.demo_items import demo_tasks
from fastskip.commands.eval_tables import show
from fastskip.commands.exams import (
    AnswerTokensOption,
    CountOption,
    ItemsOption,
    PromptsOption,
    TimedTokensOption,
    check_sources,
    exam_of,
    first_of,
)
from fastskip.commands.outputs import check_folder
from fastskip.json_file import json_text
from fastskip.study.evaluation.metrics import Metric
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.study.evaluation.exam import Exam

FILE = "judgements.jsonl"
"""Where `--out` keeps the answers."""


def evaluate(
    model: ModelOption = None,
    policies: PoliciesOption = None,
    items: ItemsOption = None,
    images: ImageFolderOption = None,
    metric: Annotated[
        Metric,
        typer.Option(
            metavar="METRIC",
            help=f"How to score answers to items that name no metric: {', '.join(Metric)}.",
        ),
    ] = Metric.EXACT,
    count: CountOption = 200,
    batch: PromptsOption = 16,
    answer_tokens: AnswerTokensOption = 32,
    new_tokens: TimedTokensOption = 16,
    rounds: Annotated[
        int, typer.Option(min=0, metavar="N", help="Timed runs per policy; 0: no timing.")
    ] = 5,
    smaller_images: Annotated[
        list[int] | None,
        typer.Option(
            "--smaller-images",
            min=2,
            metavar="N",
            help="Also judge the dense model on images with sides N times smaller: the cheapest "
            "way to fewer image rows (LLaVA-1.5 only). Repeat for several.",
            show_default=False,
        ),
    ] = None,
    skip_broken: Annotated[
        bool,
        typer.Option(
            "--skip-broken",
            help="Leave out rows that cannot be read and items that cannot be asked (image, "
            "prompt); name and count them.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help=f"Keep every answer in DIR/{FILE}, from which an interrupted run resumes; write "
            "DIR/eval.json, with small images, for [bold]fastskip report[/].",
            show_default=False,
        ),
    ] = None,
    by_kind: Annotated[
        bool,
        typer.Option("--by-kind", help="Also show scores and differences by kind of item."),
    ] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge policies: scores, agreement with the dense model, compute, TTFT and TPOT.

    Differences from the dense model are paired by item, with 95 % intervals: "not told apart" means
    that these items show no difference, not that there is none. Agreement needs no reference
    answers: the share of the dense answer's tokens before the first that differs, and the KL
    divergence of the first answer token's distribution (nats).

    Of the demo's items, a quarter are captions, a quarter are about details, and a quarter are
    second turns of a conversation.

    [bold]Examples[/]

    [cyan]fastskip eval -p image_ffn -p frozen_visual --by-kind[/] # the demo's model and items

    [cyan]fastskip eval -m llava-hf/llava-1.5-7b-hf -p mine.json --items vqa.jsonl -o runs/eval[/]

    [cyan]fastskip eval -m llava-7b -p mine.json --items llava.json --images photos
    --metric cider[/]
    """
    prepare(threads)
    check_folder("--out", out)
    check_sources(model, items, images)
    if items is None and metric is not Metric.EXACT:
        raise CommandError(
            f"--metric {metric}: the demo's items name theirs; allowed: with --items"
        )
    named = named_policies(policies)
    broken: list[str] = []
    on_broken = broken.append if skip_broken else None
    chosen = demo_tasks(count) if items is None else _read(items, images, metric, count, on_broken)
    from tqdm import tqdm

    from fastskip.study.evaluation.judging import JudgementFile, judge
    from fastskip.study.evaluation.result import write_result

    path = checkpoint(model)
    exam = _checked(exam_of(chosen, path, batch, answer_tokens), broken, skip_broken)
    smaller = {
        factor: exam_of(exam.items, path, batch, answer_tokens, factor)
        for factor in smaller_images or ()
    }
    prepared = load(path, "dense", dtype_for(model, dtype), device)
    with tqdm(total=(1 + len(named) + len(smaller)) * len(exam), disable=None) as bar:
        found = judge(
            prepared,
            named,
            exam,
            smaller=smaller,
            new_tokens=new_tokens,
            rounds=rounds,
            kept=None if out is None else JudgementFile(out / FILE),
            on_policy=bar.set_description,
            on_batch=bar.update,
        )
    if out is not None:  # first: printing the table may fail, for example on a closed pipe
        write_result(out, prepared, exam, found, new_tokens)
    if as_json:
        typer.echo(json_text([each.to_dict() for each in found], indent=2))
    else:
        show(found, exam.items, new_tokens, by_kind=by_kind)


def _read(
    file: Path,
    images: Path | None,
    metric: Metric,
    count: int,
    on_broken: Callable[[str], object] | None,
) -> list[Any]:
    from fastskip.study.evaluation.items import read_items

    return read_items(file, images, metric=metric, most=count, on_broken=on_broken)


def _checked(exam: "Exam", broken: list[str], skip_broken: bool) -> "Exam":
    """The exam without broken items, which are named and counted; an error if not `skip_broken`."""
    from tqdm import tqdm

    total = len(exam.items) + len(broken)
    with tqdm(total=len(exam), desc="reading", disable=None) as bar:
        found = exam.problems(bar.update)
    broken = [*broken, *found.values()]
    if broken and not skip_broken:
        raise first_of(broken, "; --skip-broken leaves such items out")
    for problem in broken:
        typer.echo(f"left out: {problem}", err=True)
    if broken:
        typer.echo(f"{len(broken)} of {counted(total, 'item')} left out", err=True)
    return exam.without(found) if found else exam
