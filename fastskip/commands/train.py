"""`fastskip train`: training under a policy, which skips its work in forward and backward."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    PolicyOption,
    ThreadsOption,
    checkpoint,
    config_of,
    dtype_for,
    load,
    prepare,
)
from fastskip.commands.outputs import check_folder
from fastskip.commands.train_inputs import examples_of, masks_of, policy_for
from fastskip.commands.train_report import numbers, show
from fastskip.study.json_file import json_text, write_json

if TYPE_CHECKING:
    from fastskip.study.training import Settings


MODEL, ADAPTERS, REPORT = "model", "adapters", "report.json"
"""What a run leaves in its folder."""
ROUNDS = 5
"""In which a step is timed against dense, where nothing else is asked for."""


class Parts(StrEnum):
    """What learns."""

    PROJECTOR = "projector"
    LANGUAGE = "language"
    EVERYTHING = "everything"
    LORA = "lora"
    ROUTERS = "routers"


class Precision(StrEnum):
    """What products are computed in."""

    WEIGHTS = "weights"
    BFLOAT16 = "bfloat16"


class Schedule(StrEnum):
    """How the learning rate goes down."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Padding(StrEnum):
    """Where shorter sequences are filled up."""

    LEFT = "left"
    RIGHT = "right"


def train(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the run: the trained model in model/ (or adapters/), checkpoints/, "
            "loss.png, report.json.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON lines of LLaVA's conversations; see above.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where image paths start. Default: the data's folder."),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="Train the demo's model on generated pictures, no data needed."
        ),
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            help="Rows to measure on, before and after.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    policy: PolicyOption = None,
    parts: Annotated[
        Parts,
        typer.Option(
            help="projector: as in the paper. language: projector and language model. everything: "
            "the vision encoder too. lora: adapters. routers: the policy's linear routers."
        ),
    ] = Parts.PROJECTOR,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Optimiser steps.", show_default=False)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="N", help="Passes over the data, instead. Default: 1."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples of a forward.")] = 8,
    accumulate: Annotated[
        int, typer.Option(min=1, metavar="N", help="Forwards of an optimiser step.")
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            metavar="RATE",
            help="Default: 1e-3 (projector), 2e-5 (language, everything), 2e-4 (lora), 1e-2 "
            "(routers).",
        ),
    ] = None,
    schedule: Annotated[Schedule, typer.Option(help="Down to zero, or not.")] = Schedule.COSINE,
    warmup: Annotated[float, typer.Option(metavar="SHARE", help="Of the steps.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(metavar="RATE", help="AdamW's.")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of order, adapters, dropout.")] = 0,
    precision: Annotated[
        Precision,
        typer.Option(help="bfloat16: products in bfloat16, what learns in fp32 (for GPUs)."),
    ] = Precision.WEIGHTS,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory: compute activations twice.")
    ] = False,
    padding: Annotated[Padding, typer.Option(help="Side of pads.")] = Padding.RIGHT,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps between checkpoints. Default: none."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out rows that cannot be used; count them.")
    ] = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of the adapters. Default: 16.", show_default=False),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="A", help="Their scale, by rank. Default: 32.", show_default=False),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapters to the weights at the end.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of routers: the share of rows that should skip."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Masks of pruned weights, which stay zero.", show_default=False
        ),
    ] = None,
    compare_dense: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Rounds that time a step against dense at the end; 0: none. Default: 5, and none "
            "where routers learn.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train under a policy: what it skips is skipped in the forward and the backward pass.

    Teacher forcing on the answers alone. Each line of the data is an object such as {"image":
    "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from":
    "gpt", "value": "A cat."}]}; several turns, a list of images, or no image are fine. At the end
    the time of a step is compared with that of dense training on the same batches.

    [bold]Examples[/]

    [cyan]fastskip train --demo -o runs/demo[/]

    [cyan]fastskip train --data mine.jsonl --images pictures -m llava-hf/llava-1.5-7b-hf -p
    every_nth_block --dtype bfloat16 --precision bfloat16 --checkpointing --save-every 500
    -o runs/projector[/]

    [cyan]fastskip train --data mine.jsonl -p policy.json --parts lora --steps 2000 -o runs/lora[/]

    [cyan]fastskip train --demo --parts routers --rate 0.5 -o runs/routers[/]
    """
    prepare(threads)
    path = checkpoint(model)
    config = config_of(path)
    adapters = {"rank": lora_rank, "alpha": lora_alpha}
    adapters = {name: value for name, value in adapters.items() if value is not None}
    settings = _settings(
        parts=parts.value,
        steps=60 if demo and steps is None and epochs is None else steps,
        epochs=epochs,
        batch=batch,
        accumulation=accumulate,
        learning_rate=learning_rate,
        schedule=schedule.value,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        precision=precision.value,
        gradient_checkpointing=checkpointing,
        padding=padding.value,
        save_every=save_every,
        resume=resume,
        skip_broken=skip_broken,
        rate=rate,
        adapters=adapters,
    )
    _check(
        demo=demo,
        data=data,
        images=images,
        held_out=held_out,
        model=model,
        compare_dense=compare_dense,
        merge=merge,
        mask=mask,
        parts=parts,
        adapters=adapters,
    )
    _check_out(out, resume)
    chosen = policy_for(
        policy,
        path,
        config,
        demo=demo,
        learns_routers=parts is Parts.ROUTERS,
        out=out,
        seed=seed,
    )
    learned, measured = examples_of(
        demo=demo, data=data, images=images, held_out=held_out, settings=settings
    )
    masks = masks_of(mask)

    import fastskip
    from fastskip.prompts import processor_for
    from fastskip.study.training import measuring
    from fastskip.study.training import train as run
    from fastskip.study.training.curve import require_plots, write_curve

    require_plots()
    processor = processor_for(path)
    # Only plain torch computes gradients and lets routers be replaced while they learn.
    impl = "reference" if parts is Parts.ROUTERS else None
    loaded = load(path, chosen, dtype_for(model, dtype), device, impl=impl)
    plan = fastskip.plan_of(loaded)
    batches = partial(measuring.batches_of, max_tokens=plan.shape.max_positions)
    test = [] if measured is None else batches(measured, processor, settings, 8)
    timed = batches(learned, processor, settings, 2)
    report: dict[str, Any] = {"model": path, "policy": plan.policy.name, "parts": parts.value}
    if masks is not None:
        masks.apply_(loaded)  # as training begins with it, so that losses before and after compare
    if test:
        report["held_out_loss"] = {"before": measuring.held_out_loss(loaded, test)}
    from tqdm import tqdm

    with tqdm(desc="steps", disable=None) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        trained = run(loaded, processor, learned, out, settings, masks=masks, on_step=on_step)
    if test:
        report["held_out_loss"]["after"] = measuring.held_out_loss(loaded, test)
        if parts is Parts.ROUTERS:
            report["skipped"] = measuring.skipped_shares(loaded, test)
    rounds = ROUNDS if compare_dense is None and parts is not Parts.ROUTERS else compare_dense
    comparison = None
    if rounds:
        comparison = measuring.compare_dense(loaded, timed, settings, rounds)
    report |= numbers(trained, comparison)
    saved = out / (ADAPTERS if parts is Parts.LORA and not merge else MODEL)
    trained.save(saved, processor, merge=merge)
    written = [saved]
    if trained.losses:
        write_curve(trained.losses, out / "loss.png", f"{parts.value}, {path}")
        written.append(out / "loss.png")
    # a run that had nothing to do has no times, and what made the steps has told them
    if trained.step_seconds or not (out / REPORT).is_file():
        written.append(write_json(out / REPORT, report | {"losses": trained.losses}, indent=2))
    if as_json:
        typer.echo(json_text(report, indent=2))
        return
    show(report, trained, comparison)
    typer.echo(f"wrote {', '.join(map(str, written))}", err=True)


def _settings(*, adapters: dict[str, Any], **options: Any) -> "Settings":
    from fastskip.study.training import Lora, Settings

    return Settings(lora=Lora(**adapters), **options)


def _check(
    *,
    demo: bool,
    data: Path | None,
    images: Path | None,
    held_out: Path | None,
    model: str | None,
    compare_dense: int | None,
    merge: bool,
    mask: Path | None,
    parts: Parts,
    adapters: dict[str, Any],
) -> None:
    """Options that do not go together, before anything is read."""
    if demo == (data is not None):
        given = "both are given" if demo else "neither is given"
        raise CommandError(f"--data or --demo: {given}; allowed: one of them")
    if demo and model is not None:
        raise CommandError(f"--model {model}: allowed: none beside --demo, which has its own")
    if demo and images is not None and held_out is None:
        problem = "the demo draws its own pictures"
        raise CommandError(f"--images {images}: {problem}; allowed: with --data or --held-out")
    if compare_dense and parts is Parts.ROUTERS:
        problem = "routers that learn compute all that they may skip"
        raise CommandError(f"--compare-dense {compare_dense}: {problem}; allowed: 0, or none")
    if merge and parts is not Parts.LORA:
        raise CommandError(f"--merge: parts are {parts.value}; allowed: with --parts lora")
    for name, value in adapters.items() if parts is not Parts.LORA else ():
        allowed = "with --parts lora"
        raise CommandError(f"--lora-{name} {value}: parts are {parts.value}; allowed: {allowed}")
    if merge and mask is not None:
        raise CommandError("--merge: would fill pruned weights again; allowed: without --mask")


def _check_out(out: Path, resume: bool) -> None:
    """Before the work: a place that can be written, and no result of another run there."""
    from fastskip.study.training.loop import last_checkpoint

    check_folder("--out", out)
    has_checkpoints = last_checkpoint(out) is not None
    for name in (MODEL, ADAPTERS, REPORT):
        if (out / name).exists() and not (resume and has_checkpoints):
            allowed = "a folder of its own for this run"
            if has_checkpoints:
                allowed += ", or --resume to go on with the one there"
            raise CommandError(f"--out {out}: holds {name} of a run; allowed: {allowed}")
