"""`fastskip policies`: the presets, and policy files made from them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastskip.commands.common import CommandError
from fastskip.policy.fields import MAX_DEPTH


def policies(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET", help="The preset; omit it to list them all.", show_default=False
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Set an option of the preset; repeat for several.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_DEPTH,
            metavar="N",
            help="Also show what the policy skips in a model of N layers.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Write to this file instead (.json, .yaml).",
        ),
    ] = None,
) -> None:
    """List the presets, or turn one into a policy file to edit and share.

    [bold]Example[/]

    [cyan]fastskip policies every_nth_ffn -s interval=3 -s scope=image --layers 32 -o mine.json[/]

    Other commands take the same policy as [cyan]-p every_nth_ffn:interval=3:scope=image[/].
    """
    if name is None:
        for key, value in (("set", option), ("layers", layers), ("out", out)):
            if value is not None:
                shown = value[0] if isinstance(value, list) else value
                raise CommandError(f"--{key} {shown}: no preset is named; allowed: with a preset")
        _list()
        return
    from fastskip.policy import PolicyError, SkipPolicy
    from fastskip.policy.presets import PRESETS, options_of

    options = options_of(option or (), name) if name in PRESETS else {}
    policy = SkipPolicy.preset(name, **options)
    table = None if layers is None else _table(policy, layers)
    if out is None:
        typer.echo(json.dumps(policy.to_dict(), indent=2))
    else:
        try:
            policy.save(out)
        except PolicyError as error:
            raise CommandError(f"--out {error}") from error
        except OSError as error:
            raise CommandError(f"--out {out}: {error}; allowed: a writable file") from error
        typer.echo(f"wrote {out}", err=True)
    if table is not None:
        # to stderr: the JSON on stdout may go into a pipe
        typer.echo(table, err=True)


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from fastskip.policy.presets import PRESETS, defaults_of

    table = Table("preset", "what it does", "options (-s KEY=VALUE)", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a narrow terminal shows all of a name
    for name, (_, line) in PRESETS.items():
        options = " ".join(f"{key}={_shown(value)}" for key, value in defaults_of(name).items())
        table.add_row(name, line, options)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\nOther commands take a preset as -p PRESET or -p PRESET:KEY=VALUE; fastskip policies "
        "PRESET -o FILE writes a policy file to edit."
    )


def _shown(default: object) -> str:
    """As `--set` accepts it."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "-" if default is None else str(default)


def _table(policy: Any, layers: int) -> str:
    from fastskip.plan import make_plan, shape_of_depth

    # what is skipped depends only on the depth
    return make_plan(policy, shape_of_depth(layers)).table()
