"""`fastskip study`: what skipping costs in quality, on the demo's models or any checkpoints."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ThreadsOption,
    checkpoint,
    device_of,
    load,
    policy_of,
    prepare,
)
from fastskip.commands.demo_items import demo_items
from fastskip.commands.exams import CountOption, ItemsOption, PromptsOption, TimedTokensOption
from fastskip.commands.outputs import check_folder
from fastskip.commands.progress import steps_bar
from fastskip.commands.tables import new_table
from fastskip.json_file import json_text
from fastskip.wording import counted, significant

if TYPE_CHECKING:
    from fastskip.demo.model import Size
    from fastskip.study.evaluation.comparison import Compared, Contender

DEMO = "demo:"
"""Prefix of the names of bundled models."""
DEFAULT = ("demo:large", "demo:large@paper/skip-block", "demo:medium", "demo:small")

study = typer.Typer(
    name="study",
    help="What skipping costs in quality: the paper in miniature, and models side by side.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def paper(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Run the experiments in this folder, or resume them. Default: show the bundled "
            "results.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Seeds for items and training data. Default: 3."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer cells, items and training steps.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing: show the results in --out DIR.")
    ] = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Rerun the experiments of "Skipping Computations in Multimodal LLMs" on small bundled models.

    Covers score against skipped compute, parallel sublayers and block pairs, training with half of
    the blocks skipped or 70 % of the weights removed, smaller models at equal compute, similarity
    from layer to layer, and which findings agree with the paper. Writes a report (report.md), its
    figures (PNG) and numbers (CSV, JSON). An interrupted run resumes where it stopped. On a CPU,
    three seeds took an hour of processor time, --quick --seeds 1 four minutes.

    [bold]Examples[/]

    [cyan]fastskip study paper[/] # shows the bundled results

    [cyan]fastskip study paper --out runs/paper --quick --seeds 1[/]
    """
    prepare(threads)
    from fastskip.study.paper import report

    if out is None or show:
        if out is None and (quick or seeds is not None or device is not None):
            raise CommandError("--quick, --seeds, --device: nothing runs; allowed: with --out DIR")
        _show(out or report.bundled_folder())
        return
    from fastskip.plotting import require
    from fastskip.study.paper.experiments import cells
    from fastskip.study.paper.measuring import QUICK, Effort
    from fastskip.study.paper.runner import Study

    require("figures")
    check_folder("--out", out)
    run = Study(out, seeds or 3, QUICK if quick else Effort(), cells(quick), device_of(device))
    with steps_bar(run.steps) as begin:
        results = run.run(begin)
    written = report.write(results, out)
    _show(out)
    for path in written:
        typer.echo(f"wrote {path}", err=True)


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT[@POLICY]",
            help="Folders or hub names, or demo:large, demo:medium, demo:small; after an @, a "
            f"policy file or a preset. The first is the baseline. Default: {' '.join(DEFAULT)}.",
            show_default=False,
        ),
    ] = None,
    items: ItemsOption = None,
    count: CountOption = 200,
    new_tokens: TimedTokensOption = 16,
    batch: PromptsOption = 16,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare models side by side: score, compute, TTFT, TPOT and cache on the same items.

    Is a large model that skips computation better than a smaller one of equal compute? One model is
    in memory at a time. Differences are paired by item, with 95 % intervals.

    [bold]Examples[/]

    [cyan]fastskip study compare[/]

    [cyan]fastskip study compare llava-hf/llava-1.5-13b-hf@half.json llava-7b
    --items vqa.jsonl[/]
    """
    prepare(threads)
    named = models or list(DEFAULT)
    contenders = [_contender(each, dtype, device) for each in named]
    if items is None and not all(each.startswith(DEMO) for each in named):
        raise CommandError("--items: needed with models that are not the demo's; a JSON lines file")
    from fastskip.study.evaluation.comparison import compare as measure
    from fastskip.study.evaluation.items import read_items

    chosen = demo_items(count) if items is None else read_items(items)[:count]
    with steps_bar(len(contenders)) as begin:
        found = measure(contenders, chosen, batch_size=batch, new_tokens=new_tokens, on_model=begin)
    if as_json:
        typer.echo(json_text([each.to_dict() for each in found], indent=2))
        return
    _table(found, len(chosen))


def _show(folder: Path) -> None:
    """Print the findings, and the path of the report."""
    from fastskip.study.paper.findings import Verdict, findings
    from fastskip.study.paper.report import REPORT, RESULTS
    from fastskip.study.paper.results import Results

    results = Results.load(folder / RESULTS)
    colours = {Verdict.AGREES: "green", Verdict.DISAGREES: "red", Verdict.PARTLY: "yellow"}
    table = new_table(["claim", "here", "measured"], texts=3)
    for each in findings(results):
        colour = colours.get(each.verdict, "default")
        table.add_row(each.claim, f"[{colour}]{each.verdict.value}[/]", each.evidence)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{len(results.rows)} cells, {counted(len(results.seeds), 'seed')}. The task is small "
        "and synthetic: agreement is encouraging, disagreement no refutation. Full report: "
        f"{folder / REPORT}",
        soft_wrap=True,
    )


def _contender(named: str, dtype: Dtype, device: str | None) -> "Contender":
    """The model and policy of a name; raises on wrong ones before anything is loaded."""
    from fastskip.study.evaluation.comparison import Contender

    path, _, policy = named.partition("@")
    chosen = policy_of(policy or None)
    if not path.startswith(DEMO):
        return Contender(named, partial(_load_named, checkpoint(path), chosen, dtype, device))
    from fastskip.demo.model import Size

    by_label = {DEMO + size.label: size for size in Size}
    if path not in by_label:
        allowed = ", ".join(by_label)
        raise CommandError(f"{named}: no such model; allowed: {allowed}, a folder or a hub name")
    return Contender(named, partial(_load_demo, by_label[path], chosen, dtype, device))


def _load_demo(size: "Size", policy: Any, dtype: Dtype, device: str | None) -> tuple[Any, Any]:
    import torch

    import fastskip
    from fastskip.demo.smaller import load as load_bundled
    from fastskip.demo.text import build_processor

    wanted = torch.float32 if dtype is Dtype.AUTO else getattr(torch, dtype.value)
    model = load_bundled(size).to(device_of(device), wanted)
    return fastskip.apply_(model, policy), build_processor()


def _load_named(path: str, policy: Any, dtype: Dtype, device: str | None) -> tuple[Any, Any]:
    from fastskip.prompts import processor_for

    return load(path, policy, dtype, device), processor_for(path)


def _table(found: Sequence["Compared"], count: int) -> None:
    from fastskip.study.evaluation.comparison import ALL

    titles = (
        "model",
        f"{found[0].scale.heading}, vs the first",
        "compute",
        "TTFT\nms",
        "TPOT\nms",
        "cache\nkB",
    )
    table = new_table(titles)
    for each in found:
        score, change = each.scores[ALL], each.changes.get(ALL)
        told = f"{each.scale.text(score.mean)} ({100 * score.low:.0f} to {100 * score.high:.0f})"
        if change is not None:
            interval = f"({100 * change.low:+.0f} to {100 * change.high:+.0f})"
            told += f"\n{100 * change.mean:+.1f} {interval}"
        table.add_row(
            f"{escape(each.label)}\n{significant(each.parameters / 1e6)} M weights",
            told,
            f"{each.flops / found[0].flops:.0%}\n{significant(each.flops / 1e9)} GF",
            f"{1e3 * each.ttft_s:.1f}",
            f"{1e3 * each.tpot_s:.2f}",
            f"{each.kv_bytes / 1e3:.0f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{counted(count, 'item')}, 95 % intervals; compute (GFLOP), times and cache of the first "
        f"item with {found[0].new_tokens} new tokens, batch 1. Weights: language model only."
    )
