"""`fastskip demo`: what skipping does to the bundled model."""

from pathlib import Path
from typing import Annotated

import typer

from fastskip.commands.common import prepare
from fastskip.commands.outputs import check_file, check_folder


def demo(
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write plots to this folder.", show_default=False),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write all numbers as JSON.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer scenes and policies.")] = False,
) -> None:
    """See skipping at work: quality and speed of the bundled model under several policies.

    Needs no download and no GPU. Takes a minute and a half on two cores.

    [bold]Example[/]

    [cyan]fastskip demo --quick --plots plots/[/]
    """
    prepare()
    check_folder("--plots", plots)
    check_file("--json", json)
    from fastskip.demo import show

    show.run(plots=plots, quick=quick, json=json)
