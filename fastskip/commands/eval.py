"""`fastskip eval`: what policies cost in answers and gain in time, on items of one's own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    checkpoint,
    load,
    policy_of,
    prepare,
)
from fastskip.commands.demo_items import demo_items

if TYPE_CHECKING:
    from fastskip.study.items import Item
    from fastskip.study.judging import Judgement

FILE = "judgements.jsonl"
"""What `--out` keeps."""


def evaluate(
    model: ModelOption = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="POLICY",
            help="A policy file or a preset; repeat the option for several. Each is held to the "
            "dense model, which is always there.",
            show_default=False,
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines: {"question": "...", "answer": "..." or ["...", ...], "image": '
            '"a.jpg"}, and "kind" and "metric" (exact, caption, vqa, yes-no) where wanted. '
            "Default, for the demo's model alone: its held-out ones.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Items at the most.")] = 200,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at once.")] = 16,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")
    ] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to time.")] = 16,
    rounds: Annotated[
        int, typer.Option(min=0, metavar="N", help="Timed runs of each policy; 0: none.")
    ] = 5,
    skip_broken: Annotated[
        bool,
        typer.Option(
            "--skip-broken", help="Leave out items whose image cannot be read, and say which."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help=f"Keep every answer in DIR/{FILE}; a run that was cut off goes on from there.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Judge policies: scores, agreement with the dense model, compute, TTFT and TPOT.

    Differences from the dense model are taken item by item, with 95 % intervals: "not told apart"
    means that these items show no loss, not that there is none. Agreement needs no right answers:
    the share of the dense answer's tokens before the first that differs, and how far the
    distribution of the first answer token has moved (nats).

    [bold]Examples[/]

    [cyan]fastskip eval -p image_ffn -p frozen_visual[/] (the demo's model on its own items)

    [cyan]fastskip eval -m llava-hf/llava-1.5-7b-hf -p mine.json --items vqa.jsonl --out runs/eval
    --dtype bfloat16[/]
    """
    prepare(threads)
    if items is None and model is not None:
        raise CommandError("--items: needed with --model; a file of JSON lines, see --help")
    named = [(name, policy_of(name)) for name in policies or ()]
    if len({name for name, _ in named}) < len(named):
        raise CommandError(f"--policy {policies}: one is there twice; allowed: each once")
    chosen = _items(items, count, skip_broken)
    from tqdm import tqdm

    from fastskip.prompts import processor_for
    from fastskip.study.evaluation import Exam
    from fastskip.study.judging import JudgementFile, judge

    path = checkpoint(model)
    if model is None and dtype is Dtype.AUTO:
        dtype = Dtype.FLOAT32  # what all that is said of the demo's model was measured in
    prepared = load(path, "dense", dtype, device)
    exam = Exam(
        chosen,
        processor_for(path),
        config=prepared.config,
        batch_size=batch,
        new_tokens=answer_tokens,
    )
    with tqdm(total=(1 + len(named)) * len(exam), disable=None) as bar:
        found = judge(
            prepared,
            named,
            exam,
            new_tokens=new_tokens,
            rounds=rounds,
            kept=None if out is None else JudgementFile(out / FILE),
            on_policy=bar.set_description,
            on_batch=bar.update,
        )
    if as_json:
        typer.echo(json.dumps([each.to_dict() for each in found], indent=2))
    else:
        _show(found, chosen, new_tokens)


def _items(file: Path | None, count: int, skip_broken: bool) -> list[Any]:
    """The items asked for; a broken one stops here, unless it is to be left out."""
    from fastskip.study.evaluation import usable
    from fastskip.study.items import ItemError, read_items

    chosen = demo_items(count) if file is None else read_items(file)[:count]
    found, broken = usable(chosen)
    if broken and not (skip_broken and found):
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ItemError(f"{broken[0]}{more}; --skip-broken leaves such items out")
    for problem in broken:
        typer.echo(f"left out: {problem}", err=True)
    if broken:
        typer.echo(f"{len(broken)} of {len(chosen)} items left out", err=True)
    return found


def _show(found: Sequence["Judgement"], items: Sequence["Item"], new_tokens: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fastskip.study.judging import Verdict

    dense = found[0]
    titles = ["policy", "score", "from dense", "agrees\nKL, nats", "FLOPs"]
    is_timed = dense.speed is not None
    titles += ["TTFT\nms", "TPOT\nms"] if is_timed else []
    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].overflow, table.columns[0].min_width = "fold", 16
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for each in found:
        score, change = each.evaluation.estimate(), each.change(dense)
        tokens, divergence = each.agreement.means
        verdict = "" if each is dense else Verdict.of(change).value
        row = [
            each.label,
            f"{score.mean:.1%}\n{100 * score.low:.0f} to {100 * score.high:.0f}",
            f"{100 * change.mean:+.1f}\n{100 * change.low:+.1f} to {100 * change.high:+.1f}\n"
            f"{verdict}",
            f"{tokens:.0%}\n{divergence:.2g}",
            f"{each.flops / dense.flops:.0%}",
        ]
        if each.speed is not None and dense.speed is not None:
            for own, base in (
                (each.speed.ttft_s, dense.speed.ttft_s),
                (each.speed.tpot_s, dense.speed.tpot_s),
            ):
                row.append(f"{1e3 * own:.3g}\n{base / own:.2f}x")
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    for each in found:
        answers = each.yes_no(items)
        if answers is not None:
            console.print(
                f"{each.label}: yes/no accuracy {answers.accuracy:.1%}, F1 {answers.f1:.1%}, "
                f"precision {answers.precision:.1%}, recall {answers.recall:.1%}, said yes "
                f"{answers.said_yes:.0%}"
            )
    timed = f", times with {new_tokens} new tokens, batch 1" if is_timed else ""
    console.print(
        f"{len(items)} items, 95 % intervals, differences item by item; agrees: tokens as dense, "
        f"up to the first that differs; FLOPs of the first item{timed}. Not told apart: these "
        "items show no difference."
    )
