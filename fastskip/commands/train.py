"""`fastskip train`: training under a policy, which skips work in the forward and the backward."""

from enum import StrEnum
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
from fastskip.commands.train_report import show
from fastskip.json_file import json_text, write_json

if TYPE_CHECKING:
    from fastskip.study.training import Settings


MODEL, ADAPTERS, REPORT = "model", "adapters", "report.json"
"""What a run writes to its folder."""
ROUNDS = 5
"""Default number of rounds in which a step is timed against dense."""


class Parts(StrEnum):
    """What is trained."""

    PROJECTOR = "projector"
    LANGUAGE = "language"
    EVERYTHING = "everything"
    LORA = "lora"
    ROUTERS = "routers"


class Precision(StrEnum):
    """Number format of matrix multiplies."""

    WEIGHTS = "weights"
    BFLOAT16 = "bfloat16"


class Schedule(StrEnum):
    """How the learning rate decays."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Padding(StrEnum):
    """On which side shorter sequences are padded."""

    LEFT = "left"
    RIGHT = "right"


def train(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the run: model/ (or adapters/) for the trained model, checkpoints/, "
            "loss.png, report.json.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="LLaVA conversations as JSON lines, or as one array; see above.",
            show_default=False,
        ),
    ] = None,
    images: ImageFolderOption = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="Train the demo's model on generated images, without data. Default: 60 steps "
            "under every_nth_block.",
        ),
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            help="Data to measure the loss on, before and after; as --data.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    policy: PolicyOption = None,
    parts: Annotated[
        Parts,
        typer.Option(
            metavar="PARTS",
            help="projector: as in the paper. language: projector and language model. everything: "
            "the vision encoder too. lora: adapters. routers: the policy's linear routers.",
        ),
    ] = Parts.PROJECTOR,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Optimiser steps.", show_default=False)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="N", help="Passes over the data, instead of --steps. Default: 1."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples per forward.")] = 8,
    accumulate: Annotated[
        int, typer.Option(min=1, metavar="N", help="Forwards per optimiser step.")
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
    schedule: Annotated[
        Schedule,
        typer.Option(metavar="SHAPE", help=f"Learning rate decay: {', '.join(Schedule)}."),
    ] = Schedule.COSINE,
    warmup: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the steps for warm-up.")
    ] = 0.03,
    weight_decay: Annotated[
        float, typer.Option(metavar="RATE", help="Weight decay of AdamW.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of data order, adapters and dropout.")
    ] = 0,
    precision: Annotated[
        Precision,
        typer.Option(help="bfloat16: multiplies in bfloat16, trained weights in fp32 (for GPUs)."),
    ] = Precision.WEIGHTS,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations, to save memory.")
    ] = False,
    padding: Annotated[Padding, typer.Option(help="Side that is padded.")] = Padding.RIGHT,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps between checkpoints. Default: none."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint, if there is one.")
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out unusable rows, and count them.")
    ] = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Adapter rank. Default: 16.", show_default=False),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            metavar="A", help="Adapters are scaled by A / rank. Default: 32.", show_default=False
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapters into the weights at the end.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="For --parts routers: target share of rows to skip."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Masks from prune: pruned weights stay zero.", show_default=False
        ),
    ] = None,
    compare_dense: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Rounds that time a step against dense at the end. Default: 5; 0 with --parts "
            "routers.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train under a policy, which skips work in both the forward and the backward pass.

    Teacher forcing, with the loss on answers only. Each line of the data is an object such as
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
    {"from": "gpt", "value": "A cat."}]}; several turns, a list of images, or no image are allowed.
    At the end, the step time is compared with dense training on the same batches. On a GPU,
    [cyan]--dtype bfloat16 --precision bfloat16 --checkpointing[/] save memory.

    [bold]Examples[/]

    [cyan]fastskip train --demo -o runs/demo[/]

    [cyan]fastskip train --data mine.jsonl -m llava-hf/llava-1.5-7b-hf -p every_nth_block
    -o runs/half[/]

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

    from fastskip.commands.train_run import run
    from fastskip.loading import plan_of
    from fastskip.plotting import require
    from fastskip.prompts import processor_for
    from fastskip.study.training.curve import write_curve
    from fastskip.study.training.loop import last_checkpoint

    require("loss curve", "train")
    processor = processor_for(path)
    # Only plain torch computes gradients and lets routers be replaced while they train.
    impl = "reference" if parts is Parts.ROUTERS else None
    loaded = load(path, chosen, dtype_for(model, dtype), device, impl=impl)
    about = {"model": path, "policy": plan_of(loaded).policy.name, "parts": parts.value}
    rounds = ROUNDS if compare_dense is None and parts is not Parts.ROUTERS else compare_dense or 0
    try:
        done = run(loaded, processor, learned, measured, out, settings, masks, rounds)
    except KeyboardInterrupt:
        kept = last_checkpoint(out)
        if kept is not None:
            typer.echo(f"stopped; {kept} is kept, --resume continues it", err=True)
        raise
    report, trained = about | done.report, done.trained
    saved = out / (ADAPTERS if parts is Parts.LORA and not merge else MODEL)
    trained.save(saved, processor, merge=merge)
    written = [saved]
    if trained.losses:
        write_curve(trained.losses, out / "loss.png", f"{parts.value}, {path}")
        written.append(out / "loss.png")
    # a resumed run with no steps left has no times; the run that did the steps wrote them
    if trained.step_seconds or not (out / REPORT).is_file():
        written.append(write_json(out / REPORT, report | {"losses": trained.losses}, indent=2))
    if as_json:
        typer.echo(json_text(report, indent=2))
        return
    show(report, trained, done.comparison)
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
    """Rejects options that do not go together before anything is read."""
    if demo == (data is not None):
        given = "both given" if demo else "neither given"
        raise CommandError(f"--data or --demo: {given}; allowed: one of the two")
    if demo and model is not None:
        raise CommandError(f"--model {model}: allowed: only without --demo, which has its own")
    if demo and images is not None and held_out is None:
        problem = "the demo draws its own images"
        raise CommandError(f"--images {images}: {problem}; allowed: with --data or --held-out")
    if compare_dense and parts is Parts.ROUTERS:
        problem = "training routers computes all that they may skip"
        raise CommandError(f"--compare-dense {compare_dense}: {problem}; allowed: 0")
    if merge and parts is not Parts.LORA:
        raise CommandError(f"--merge: --parts is {parts.value}; allowed: with --parts lora")
    for name, value in adapters.items() if parts is not Parts.LORA else ():
        problem = f"--parts is {parts.value}"
        raise CommandError(f"--lora-{name} {value}: {problem}; allowed: with --parts lora")
    if merge and mask is not None:
        raise CommandError("--merge: would overwrite pruned zeros; allowed: without --mask")


def _check_out(out: Path, resume: bool) -> None:
    """Rejects a folder that cannot be written or holds another run, before the work starts."""
    from fastskip.study.training.loop import CHECKPOINTS, last_checkpoint

    check_folder("--out", out)
    has_checkpoints = last_checkpoint(out) is not None
    found = [name for name in (MODEL, ADAPTERS, REPORT) if (out / name).exists()]
    if has_checkpoints:
        found.append(CHECKPOINTS)
    if found and not (resume and has_checkpoints):
        allowed = "another folder"
        if has_checkpoints:
            allowed += ", or --resume to continue it"
        raise CommandError(f"--out {out}: holds {found[0]} of an earlier run; allowed: {allowed}")
