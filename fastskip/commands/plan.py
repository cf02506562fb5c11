"""`fastskip plan`: what a policy skips in a model, and the most that can save."""

import json
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fastskip.commands.common import (
    BandwidthOption,
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    PolicyOption,
    TflopsOption,
    ThreadsOption,
    ceilings_of,
    checkpoint,
    config_of,
    dtype_for,
    prepare,
    resolve_policy,
)
from fastskip.commands.tables import new_table, number_table, show_table
from fastskip.wording import significant

if TYPE_CHECKING:
    from fastskip.commands import forecast
    from fastskip.commands.forecast import Forecast
    from fastskip.plan.costs import Speedup


def plan(
    model: ModelOption = None,
    policy: PolicyOption = None,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Image positions per prompt. Default: one image, as a single crop where the "
            "model splits images.",
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Other positions.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts per batch.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Share of rows that routers skip, for the expected costs. Default: what the "
            "routers state, if they do.",
            show_default=False,
        ),
    ] = None,
    bandwidth: BandwidthOption = None,
    tflops: TflopsOption = None,
    launches: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help="Also count kernel launches and their programs on the GPU of this tuning table, "
            'e.g. nvidia-h200 or default (needs the extra "gpu", but no GPU).',
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object; its field assumed_image is the image that the default of "
            "--image-tokens assumes, null if image sizes do not matter.",
        ),
    ] = False,
) -> None:
    """Show what a policy skips, what that saves, and the largest speed-up it can give.

    Reads only the checkpoint's config. Floors are the shortest times that memory bandwidth and
    arithmetic throughput allow; they cover the decoder and lm_head, not the vision tower.

    Routers decide at run time, so three columns are shown for them: all rows run, all skip, and the
    mean to expect at [cyan]--rate[/]. FLOPs fall in proportion to the rate p, but the weights of a
    guarded sublayer are read unless the whole batch of B skips: a routed decode step still reads
    1 - p^B of them, a prefill nearly all.

    [bold]Examples[/]

    [cyan]fastskip plan -m llava-hf/llava-1.5-7b-hf -p image_ffn --dtype bfloat16[/]

    [cyan]fastskip plan -m llava-hf/llava-1.5-7b-hf -p mine.json --bandwidth 3350 --tflops 800[/]

    [cyan]fastskip plan -m llava-hf/llava-1.5-7b-hf -p every_nth_block --launches nvidia-h200[/]

    [cyan]fastskip plan -p router.json --rate 0.5 --batch 4[/]
    """
    prepare(threads)
    path = checkpoint(model)
    config = config_of(path)

    from fastskip.commands import forecast
    from fastskip.families import assumed_of_images, rows_of_crop

    chosen = resolve_policy(policy, path, config)
    load = forecast.AssumedCall(
        rows_of_crop(config) if image_tokens is None else image_tokens,
        text_tokens,
        new_tokens,
        batch,
    )
    number = forecast.dtype_of(config, dtype_for(model, dtype).value)
    if device is not None and (bandwidth is not None or tflops is not None):
        raise CommandError(f"--device {device}: allowed: only without --bandwidth and --tflops")
    machine = ceilings_of(bandwidth, tflops, number, device)
    result = forecast.forecast(config, chosen, load, number, machine, rate)
    counted = _launches(result, launches)
    assumed = assumed_of_images(config) if image_tokens is None else None
    if as_json:
        found = {"model": path, "assumed_image": assumed} | result.to_dict()
        if counted is not None:
            names = ("dense", "with_policy")
            found["launches"] = {
                name: each.to_dict() for name, each in zip(names, counted, strict=True)
            }
        typer.echo(json.dumps(found, indent=2))
        return
    _show(path, result, assumed)
    if counted is not None:
        _show_launches(result, *counted)


def _launches(
    result: "Forecast", table: str | None
) -> "tuple[forecast.Launches, forecast.Launches] | None":
    """Launches of the dense plan and of the policy's."""
    if table is None:
        return None
    if find_spec("triton") is None:
        raise CommandError("--launches: needs triton; install it with: pip install 'fastskip[gpu]'")
    from fastskip.commands import forecast
    from fastskip.launches import tables
    from fastskip.plan import make_plan
    from fastskip.policy import SkipPolicy

    if table not in tables():
        raise CommandError(f"--launches {table}: allowed: {', '.join(tables())}")
    dense = make_plan(SkipPolicy(), result.plan.shape)
    return (
        forecast.launches(dense, result.workload, table),
        forecast.launches(result.plan, result.workload, table),
    )


def _show_launches(
    result: "Forecast", dense: "forecast.Launches", skipping: "forecast.Launches"
) -> None:
    table = number_table(["", "dense", escape(result.plan.name)], 12)
    for label, before, after in (
        ("prefill", dense.prefill, skipping.prefill),
        ("decode step", dense.decode, skipping.decode),
    ):
        table.add_row(f"{label} launches", str(before.launches), str(after.launches))
        table.add_row(f"  {label} programs", str(before.programs), str(after.programs))
        for kernel in sorted(before.by_kernel.keys() | after.by_kernel.keys()):
            counts = [str(each.by_kernel.get(kernel, (0, 0))[0]) for each in (before, after)]
            table.add_row(f"  {kernel}", *counts)
    show_table(Console(highlight=False), table)


def _show(model: str, result: "Forecast", assumed: str | None) -> None:
    load, name = result.workload, escape(result.plan.name)
    console = Console(highlight=False)
    depth = result.plan.shape.depth
    about = f"{depth} layers, {result.dtype_name}"
    console.print(f"[bold]{name}[/] on {escape(model)}: {about}", soft_wrap=True)
    if result.is_quantised:
        console.print(
            f"This checkpoint's weights are quantised but counted as {result.dtype_name} here; "
            "they take fewer bytes, so the decode floors are too high."
        )
    if result.plan.is_dense:
        console.print("Nothing is skipped. Name a policy with -p (see fastskip policies).")
    else:
        titles = ["layers", "arrangement", *result.plan.classes]
        layers = new_table(titles, len(titles))
        for row in result.plan.rows():
            layers.add_row(row.layers, row.arrangement, *row.cells)
        console.print(layers)
    console.print(
        f"{load.batch} x ({load.image_tokens} image + {load.text_tokens} text positions, "
        f"{load.new_tokens} new tokens):"
    )
    if assumed is not None:
        console.print(f"Assumed: {assumed}. Set --image-tokens N to the actual number of rows.")
    columns = _columns(result, name)
    compared = next((c for c in columns if c[0] == "expected"), columns[-1])
    ratio = "policy" if result.routed is None else compared[0]
    gain = [] if result.plan.is_dense else [f"dense\n/ {ratio}"]
    costs = number_table(["", *(title for title, *_ in columns), *gain], 12)
    for label, field, unit in _LINES:
        values = [getattr(totals, field) for _, totals, _ in columns]
        dense, own = (getattr(totals, field) for totals in (result.dense, compared[1]))
        ratios = [_times(dense, own)] if gain else []
        costs.add_row(label, *(_si(each, unit) for each in values), *ratios)
    if result.routed is not None:
        for phase in ("prefill", "decode"):
            gains = [
                "-" if gain is None else f"{getattr(gain, phase):.2f}x" for *_, gain in columns
            ]
            costs.add_row(f"ideal {phase} gain", *gains, "", style="bold")
    show_table(console, costs)
    ceilings, ideal = result.ceilings, compared[2] or result.ideal
    which = "" if result.routed is None else f" ({compared[0]})"
    console.print(
        f"Ideal gain{which}: prefill [bold]{ideal.prefill:.2f}x[/], decode "
        f"[bold]{ideal.decode:.2f}x[/], at {_si(ceilings.bandwidth_bytes_per_s, 'B/s')} and "
        f"{_si(ceilings.flops_per_s, 'FLOP/s')}."
    )
    if result.routed is not None:
        console.print(_about_routers(result, result.routed))


def _columns(
    result: "Forecast", name: str
) -> list[tuple[str, "forecast.Totals", "Speedup | None"]]:
    """Title, totals and ideal gain of dense and of the plan; with routers, of each outcome."""
    routed = result.routed
    found: list[tuple[str, forecast.Totals, Speedup | None]] = [("dense", result.dense, None)]
    if result.plan.is_dense:
        return found
    if routed is None:
        return [*found, (name, result.skipping, result.ideal)]
    found.append(("all run", result.skipping, result.ideal))
    if routed.expected is not None:
        found.append(("expected", routed.expected.totals, routed.expected.ideal))
    return [*found, ("all skip", routed.all_skip.totals, routed.all_skip.ideal)]


def _about_routers(result: "Forecast", routed: "forecast.Routed") -> str:
    from fastskip.plan.chances import weights_read
    from fastskip.policy import Group, TokenClass

    about = "Routers decide the cells with ? at run time. "
    if routed.rates is None:
        return about + "Pass --rate SHARE for the expected costs if that share of rows skips."
    skipping = ", ".join(f"{rate:.0%}" for rate in dict.fromkeys(routed.rates.values()))
    about += f"Expected: the mean if {skipping} of rows skip. "
    batch = result.workload.batch
    in_steps = {
        (routed.rates[cell.number], cell.rule.group or Group.ROW)
        for cell in result.plan.routed
        if cell.token_class is TokenClass.GENERATED
    }
    if not in_steps:
        return about + "Decode steps are not routed: they read all weights that no rule skips."
    shares = [
        f"{weights_read(rate, batch, group):.0%}"
        + (f" ({rate:.0%} by {group})" if len(in_steps) > 1 else "")
        for rate, group in sorted(in_steps)
    ]
    return (
        f"{about}A decode step of batch {batch} then reads {', '.join(shares)} of a guarded "
        "sublayer's weights: a single running row reads them all."
    )


def _times(before: float, after: float) -> str:
    return f"{before / after:.2f}" if after else "-"


_LINES = (
    ("prefill FLOPs", "prefill_flops", "FLOP"),
    ("prefill bytes", "prefill_bytes", "B"),
    ("prefill floor", "prefill_floor_s", "s"),
    ("decode step FLOPs", "decode_flops", "FLOP"),
    ("decode step bytes", "decode_bytes", "B"),
    ("decode step floor", "decode_floor_s", "s"),
    ("KV cache at end", "kv_bytes", "B"),
)


def _si(value: float, unit: str) -> str:
    """Three digits and a prefix: 1.23 GB."""
    prefixes = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E")
    thousands = math.floor(math.log(value, 1000)) if value else 0
    thousands = max(-3, min(6, thousands))
    return f"{significant(value / 1000**thousands)} {prefixes[thousands + 3]}{unit}"
