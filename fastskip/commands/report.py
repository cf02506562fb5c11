"""`fastskip report`: the results of eval, bench and search on one page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastskip.commands.common import CommandError, config_of
from fastskip.commands.outputs import check_file
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.plan.layer_plan import ModelShape
    from fastskip.study.report.circumstances import Circumstances
    from fastskip.study.report.maps import ShapeOf


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Folders that eval, bench and search wrote with --out, containing eval.json, "
            "bench.json or search.json.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Page to write.")] = Path(
        "report.html"
    ),
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            metavar="DIR",
            help="Folder for the charts as PNG files. Default: next to the page, its name plus "
            "_files.",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, metavar="N", help="Maximum number of items with both answers.")
    ] = 12,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH",
            help="Checkpoint whose config the maps use. Default: the results' own, if it is local.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of the model's layers, if neither its config nor --model is available.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Put the results of eval, bench and search on one page.

    Shows score against TTFT and TPOT with intervals, what each policy runs layer by layer,
    sensitivity, measured times against the floors, tables with verdicts ("slower here" included),
    items that dense and policies answer differently, and how everything was measured. The page is
    one self-contained file with light and dark themes, for phones, desktops and print; the charts
    are also written as PNG files. No model runs. Policy maps need the model's config, found where
    the results' own model is, or given by --model; --layers is enough too.

    [bold]Examples[/]

    [cyan]fastskip eval -p image_ffn --out runs/eval && fastskip report runs/eval[/]

    [cyan]fastskip report runs/eval runs/bench runs/search --out runs/report.html[/]
    """
    if model is not None and layers is not None:
        raise CommandError(f"--layers {layers}: --model already gives it; allowed: one of the two")
    check_file("--out", out, (".html", ".htm"))
    from tqdm import tqdm

    from fastskip.study.report import write_report

    with tqdm(total=None, disable=None, bar_format="{desc}") as bar:
        written = write_report(
            folders,
            out,
            png or out.with_name(f"{out.stem}_files"),
            _shapes(model),
            layers=layers,
            examples=examples,
            on_part=bar.set_description,
        )
    typer.echo(f"wrote {written[0]} ({written[0].stat().st_size / 1e6:.1f} MB)", err=True)
    if len(written) > 1:
        charts = counted(len(written) - 1, "chart")
        typer.echo(f"wrote {charts} in {written[1].parent}", err=True)


def _shapes(model: str | None) -> "ShapeOf":
    """The shapes for the maps: of the model named, else of a result's own model, if it is local."""
    known: dict[str, ModelShape | None] = {}
    if model is not None:
        from fastskip.families import shape_of

        named = shape_of(config_of(model))
        return lambda circumstances: named

    def find(circumstances: "Circumstances") -> "ModelShape | None":
        if circumstances.model not in known:
            known[circumstances.model] = _local_shape(circumstances.model)
        return known[circumstances.model]

    return find


def _local_shape(model: str) -> "ModelShape | None":
    """The shape of a checkpoint on this machine; nothing is downloaded."""
    from transformers import AutoConfig

    from fastskip.families import shape_of

    try:
        return shape_of(AutoConfig.from_pretrained(model, local_files_only=True))
    except (OSError, ValueError):
        return None  # the page explains why there is no map
