"""The `fastskip` command. Each subcommand is a thin wrapper of the public API, imported on use."""

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fastskip import __version__
from fastskip.atomic_files import FULL
from fastskip.commands.bench import bench
from fastskip.commands.calibrate import calibrate
from fastskip.commands.demo import demo
from fastskip.commands.eval import evaluate
from fastskip.commands.generate import generate
from fastskip.commands.plan import plan
from fastskip.commands.policies import policies
from fastskip.commands.prune import prune
from fastskip.commands.report import report
from fastskip.commands.search import search
from fastskip.commands.study import compare, paper, study
from fastskip.commands.train import train
from fastskip.commands.verify import verify

EXIT_ERROR = 2


class _Commands(TyperGroup):
    """Errors that the package raises itself are for the user to fix: one line, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            is_own = type(error).__module__.partition(".")[0] == "fastskip"
            if not is_own and not _is_out_of_memory(error):
                raise
            what = str(error) if is_own else f"out of memory: {error}"
            _print_error(" ".join([what, *getattr(error, "__notes__", ())]))
            raise typer.Exit(EXIT_ERROR) from error

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As typer's, which exits silently on a closed pipe, but reports a full disk, including one
        that stdout is redirected to."""
        try:
            return super().main(*arguments, **options)
        except OSError as error:
            if error.errno not in FULL:
                raise
            with suppress(OSError):  # stderr may be redirected to it too
                where = "" if error.filename is None else f" to {error.filename}"
                _print_error(f"cannot write{where}: {error.strerror}")
            _drop_output()
            sys.exit(EXIT_ERROR)


def _is_out_of_memory(error: Exception) -> bool:
    """Checks names, because torch is not imported before a command needs it."""
    has_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return has_type or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _print_error(message: str) -> None:
    """Prints one line for the user."""
    # file names may contain bytes that are not valid text and cannot be printed
    printable = message.encode(errors="backslashreplace").decode()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(" ".join(printable.split()), style="red", markup=False, emoji=False)


def _drop_output() -> None:
    """Discards what stdout could not take; otherwise Python fails on it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="fastskip",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # unexpected errors keep Python's own traceback
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(function: Callable[..., None]) -> str:
    """The docstring with its paragraphs unwrapped: typer would keep their line breaks."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for command in (demo, policies, plan, verify, generate, calibrate, search, train, prune, bench):
    app.command(help=_help(command))(command)
app.command(name="eval", help=_help(evaluate))(evaluate)
app.command(help=_help(report))(report)
for part in (paper, compare):
    study.command(help=_help(part))(part)
app.add_typer(study)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastskip {__version__}")
        raise typer.Exit


def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Skip computation in LLaVA-style multimodal LLMs, and run measurably faster.

    Start with [bold]fastskip demo[/], which needs no download and no GPU. [bold]policies[/] lists
    presets and turns them into policy files, [bold]plan[/] predicts what a policy saves without
    loading any weights, [bold]verify[/] checks that a model computes what its policy says,
    [bold]generate[/] answers a question about an image, [bold]calibrate[/] sets routers so that a
    target share of rows skips, [bold]search[/] finds a policy for a budget, [bold]train[/] recovers
    quality by training under a policy, [bold]prune[/] sets weights to zero, [bold]bench[/] measures
    how fast policies are on this machine, [bold]eval[/] how well they answer, [bold]study[/] what
    skipping costs in quality, and [bold]report[/] puts the results on one page.
    """


app.callback(help=_help(main))(main)
