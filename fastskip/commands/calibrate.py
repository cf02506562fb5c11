"""`fastskip calibrate`: thresholds at which a target share of rows skips."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageFolderOption,
    JsonOption,
    ModelOption,
    PolicyOption,
    ThreadsOption,
    checkpoint,
    config_of,
    dtype_for,
    load,
    prepare,
    resolve_policy,
)
from fastskip.commands.outputs import check_file
from fastskip.commands.samples import SamplesOption, calibration_inputs
from fastskip.commands.tables import new_table
from fastskip.json_file import json_text
from fastskip.policy.file import SUFFIXES
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.study.calibration import Calibration


class Per(StrEnum):
    """What gets its own threshold."""

    LAYER = "layer"
    OVERALL = "overall"


def calibrate(
    rate: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="SHARE", help="Target share of rows that skip."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="Policy file to write (.json, .yaml)."),
    ],
    model: ModelOption = None,
    policy: PolicyOption = None,
    per: Annotated[
        Per,
        typer.Option(
            help="layer: every layer skips this share, by its own threshold. overall: one "
            "threshold per router, so that shares differ between layers, as their scores do."
        ),
    ] = Per.LAYER,
    samples: SamplesOption = None,
    images: ImageFolderOption = None,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Use at most the first N samples.")
    ] = 32,
    new_tokens: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Tokens to generate per sample: their rows count too."
        ),
    ] = 16,
    sweeps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of passes over the samples.")
    ] = 8,
    tolerance: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="SHARE", help="Largest miss that counts as reached."),
    ] = 0.02,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set a policy's routers so that a target share of rows skips, from a few samples.

    Runs the samples, records the scores of each router's rows, and sets its threshold so that the
    target share skips; then repeats, because skipping in one layer changes the scores in later
    ones. A linear router with a capacity gets 1 - rate, a random one the rate itself. The policy
    file records the thresholds and how close they came on these samples. Rows with equal scores
    skip together, so exact rates are rare. Inputs other than the samples may skip more or less.

    [bold]Examples[/]

    [cyan]fastskip calibrate -p routers.json --rate 0.5 -o half.json[/]

    [cyan]fastskip calibrate -p routers.json --rate 0.3 --per overall -o third.json[/]

    [cyan]fastskip calibrate -m llava-7b -p routers.json --rate 0.5 --samples mine.jsonl
    -o half.json[/]
    """
    prepare(threads)
    path = checkpoint(model)
    config = config_of(path)
    chosen = resolve_policy(policy, path, config)
    check_file("--out", out, SUFFIXES, creates=False)
    inputs, source = calibration_inputs(model, path, config, samples, images, count, new_tokens)

    from tqdm import tqdm

    from fastskip.study.calibration import calibrate as find

    # Only plain torch exposes what routers decide; the thresholds hold for the kernels too.
    loaded = load(path, chosen, dtype_for(model, dtype), device, impl="reference")

    with tqdm(total=sweeps * len(inputs), desc="samples, all sweeps", disable=None) as bar:
        found = find(
            loaded,
            inputs,
            rate,
            per=per.value,
            new_tokens=new_tokens,
            sweeps=sweeps,
            tolerance=tolerance,
            about={"source": source},
            on_sample=bar.update,
        )
    try:
        found.policy.save(out)
    except OSError as error:
        raise CommandError(f"--out {out}: {error}; allowed: a writable file") from error
    if as_json:
        typer.echo(json_text({"model": path, "policy": str(out)} | found.to_dict(), indent=2))
        return
    _show(found)
    typer.echo(f"wrote {out}", err=True)


def _show(found: "Calibration") -> None:
    console = Console(highlight=False)
    titles = ("router", "kind", "tokens", "skips", "layer", "set to", "rows", "achieved")
    table = new_table(titles, texts=4)
    for share in found.shares:
        written = share.rule.to_dict()
        name = next(name for name in ("threshold", "capacity", "rate") if name in written)
        tokens = written["tokens"]
        table.add_row(
            str(share.router),
            written["kind"],
            tokens if tokens == "all" else ", ".join(tokens),
            ", ".join(written["skip"]),
            str(share.layer),
            f"{name} {written[name]:g}",
            str(share.candidates),
            f"{share.achieved:.1%}",
        )
    console.print(table)
    console.print(
        f"Overall [bold]{found.achieved:.1%}[/] of rows skip after "
        f"{counted(found.sweeps, 'sweep')} (target {found.wanted:.1%}); the worst threshold is off "
        f"by {found.gap:.1%}."
    )
    for line in _reasons(found):
        console.print(line)
    if any(share.rule.kind == "random" for share in found.shares):
        console.print("Random routers draw per position: few positions may be far from the rate.")


def _reasons(found: "Calibration") -> list[str]:
    """Why the target share was not reached, if it was not."""
    if found.is_reached:
        return []
    lines = [f"[yellow]Not reached within {found.tolerance:.1%}.[/]"]
    bound = sorted(
        {
            share.layer
            for share in found.shares
            if share.possible is not None and abs(share.possible - found.wanted) > found.tolerance
        }
    )
    if bound:
        layers = f"layer{'s' if len(bound) > 1 else ''} {', '.join(map(str, bound))}"
        lines.append(
            f"In {layers} no threshold comes closer: rows with equal scores skip together, and "
            "similarity has no score before the first layer that ran."
        )
    else:
        lines.append("More --sweeps or --samples may come closer.")
    return lines
