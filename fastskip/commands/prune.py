"""`fastskip prune`: set weights that matter little to zero, and store them compactly."""

import math
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.atomic_files import writing
from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageFolderOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    checkpoint,
    config_of,
    dtype_for,
    load,
    prepare,
)
from fastskip.commands.outputs import check_file, check_folder
from fastskip.commands.prune_report import Zeros, show
from fastskip.commands.samples import SamplesOption, calibration_inputs
from fastskip.json_file import json_text
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.study.pruning import Recipe, WeightMasks


class Method(StrEnum):
    """The score by which weights are kept."""

    WANDA = "wanda"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Part(StrEnum):
    """Which projections of a layer are pruned."""

    BLOCK = "block"
    ATTENTION = "attention"
    FFN = "ffn"


class Per(StrEnum):
    """The group within which weights compete."""

    ROW = "row"
    MATRIX = "matrix"


class Combine(StrEnum):
    """How several mask files are combined."""

    INTERSECTION = "intersection"
    UNION = "union"
    EXCLUSION = "exclusion"


class Stored(StrEnum):
    """How the pruned model is written."""

    SPARSE = "sparse"
    DENSE = "dense"


def prune(
    model: ModelOption = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="wanda: |weight| times the norm of its input on samples, layer by layer. "
            "magnitude: |weight|. random: random scores. Default: wanda.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of weights to remove, such as 0.5."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Keep N of every M neighbours, such as 2:4 or 4:8."),
    ] = None,
    per: Annotated[
        Per | None,
        typer.Option(help="Where weights compete. Default: row with wanda, else matrix."),
    ] = None,
    part: Annotated[
        Part | None,
        typer.Option(help="Projections to prune. Default: block.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="SLICE", help='Layers to prune, such as "4:-1". Default: all.'),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of random draws.")] = 0,
    samples: SamplesOption = None,
    images: ImageFolderOption = None,
    count: Annotated[
        int, typer.Option(min=1, metavar="N", help="Use at most the first N samples.")
    ] = 128,
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Prune by these masks instead of a method; repeat the option for several files.",
            show_default=False,
        ),
    ] = None,
    combine: Annotated[
        Combine,
        typer.Option(
            metavar="HOW",
            help="How several mask files are combined. intersection: keep what all keep, the "
            "sub-network that tasks share. union: keep what any keeps. exclusion: keep what the "
            "first keeps, except a random --share of what both keep.",
        ),
    ] = Combine.INTERSECTION,
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="For --combine exclusion. Default: all of it."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Write the pruned model to this new or empty folder.",
            show_default=False,
        ),
    ] = None,
    stored: Annotated[
        Stored,
        typer.Option(
            help="sparse: pruned weights as bitmap and values, readable only by fastskip. dense: "
            "zeros included, an ordinary checkpoint."
        ),
    ] = Stored.SPARSE,
    save_masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write which weights are kept, one bit each (.safetensors).",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the least important weights of the decoder's blocks to zero, judged on a few samples.

    Wanda runs the samples layer by layer; each layer sees the output of the pruned layers below.
    Padding has no effect. Exactly the given share of every row or matrix is removed. Masks record
    which weights are kept; those of several tasks can be combined, and [bold]fastskip train
    --mask[/] keeps the rest at zero. A sparse checkpoint is smaller on disk;
    [bold]load_model(..., weights="bitmap")[/] or "csr" keeps it small in memory.

    [bold]Examples[/]

    [cyan]fastskip prune --ratio 0.5 -o half --save-masks half.safetensors[/]

    [cyan]fastskip prune -m llava-hf/llava-1.5-7b-hf --pattern 2:4 --part ffn --samples vqa.jsonl
    -o pruned[/]

    [cyan]fastskip prune --masks vqa.safetensors --masks captions.safetensors -o shared[/]
    """
    prepare(threads)
    _check_outputs(out, save_masks, stored)
    path = checkpoint(model)
    config = config_of(path)

    import fastskip
    from fastskip.study.pruning import Recipe, WeightMasks, find_masks

    recipe: Recipe | None = None
    inputs: list[Any] = []
    source = None
    ours = {"method": method, "pattern": pattern, "per": per, "part": part, "layers": layers}
    asked = {name: str(value) for name, value in ours.items() if value is not None}
    _check_combination(combine, share, masks)
    if masks:
        _check_alone({**asked, "ratio": ratio, "samples": samples, "images": images})
        found = _combined([WeightMasks.load(file) for file in masks], combine, share, seed)
    else:
        recipe = Recipe(ratio=ratio, seed=seed, **asked)
        if recipe.method.value == Method.WANDA:
            inputs, source = calibration_inputs(model, path, config, samples, images, count, 1)
        else:
            _check_unused({"samples": samples, "images": images}, recipe.method)
    loaded = load(path, None, dtype_for(model, dtype), device, impl="reference")
    if out is not None and stored is Stored.SPARSE:
        _check_pays(loaded, found if recipe is None else recipe)
    if recipe is not None:
        from tqdm import tqdm

        with tqdm(desc="layers", total=fastskip.plan_of(loaded).shape.depth, disable=None) as bar:
            about = {} if source is None else {"source": source}
            found = find_masks(loaded, recipe, inputs, about=about, on_layer=bar.update)
    before = found.zeros(loaded)
    found.apply_(loaded)
    weights = {name: own.mask.numel() for name, own in found.kept.items()}
    zeros = Zeros(before, found.zeros(loaded), weights)
    sizes = _write(loaded, found, path, out, stored, save_masks)
    if as_json:
        report = {"model": path, **zeros.shares(zeros.weights), **sizes}
        report["layers"] = zeros.by_layer()
        typer.echo(json_text(report | {"provenance": dict(found.provenance)}, indent=2))
        return
    show(zeros, "by masks" if recipe is None else f"{recipe.ratio:.2%}")
    for place, what in ((save_masks, "masks"), (out, "weights")):
        if place is not None:
            size = sizes[f"{what}_bytes"]
            typer.echo(f"wrote {place} ({what}, {size / 1e6:.2f} MB)", err=True)


def _check_outputs(out: Path | None, save_masks: Path | None, stored: Stored) -> None:
    """Rejects outputs that cannot be written before the work starts."""
    if out is None and save_masks is None:
        raise CommandError("--out: missing; allowed: a folder, or --save-masks FILE, or both")
    if out is None and stored is Stored.DENSE:
        raise CommandError(f"--stored {stored}: only masks are written; allowed: with --out FOLDER")
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise CommandError(f"--out {out}: allowed: a new or empty folder")
    check_folder("--out", out)
    check_file("--save-masks", save_masks, creates=False)


def _check_unused(given: dict[str, object], method: str) -> None:
    for name, value in given.items():
        if value is not None:
            problem = f"not used by --method {method}"
            raise CommandError(f"--{name} {value}: {problem}; allowed: with --method wanda")


def _check_alone(others: dict[str, object]) -> None:
    for name, value in others.items():
        if value is not None:
            raise CommandError(f"--{name} {value}: given with --masks; allowed: one of the two")


def _check_combination(combine: Combine, share: float | None, masks: list[Path] | None) -> None:
    if share is not None and combine is not Combine.EXCLUSION:
        raise CommandError(f"--share {share}: allowed: with --combine exclusion")
    count = len(masks or ())
    if combine is Combine.EXCLUSION and count != 2:
        files = counted(count, "mask file")
        raise CommandError(f"--combine exclusion: {files}; allowed: two --masks")
    if combine is Combine.UNION and not count:
        raise CommandError(f"--combine {combine}: no mask files; allowed: with --masks")


def _combined(
    found: "list[WeightMasks]", combine: Combine, share: float | None, seed: int
) -> "WeightMasks":
    if combine is Combine.EXCLUSION:
        return found[0].exclude(found[1], 1.0 if share is None else share, seed=seed)
    if combine is Combine.UNION:
        return reduce(lambda a, b: a | b, found)
    return reduce(lambda a, b: a & b, found)


def _check_pays(loaded: Any, asked: "WeightMasks | Recipe") -> None:
    """Rejects so few zeros that bitmaps would take more space than they save."""
    from fastskip.sparse.convert import least_zeros
    from fastskip.sparse.matrices import matrices
    from fastskip.study.pruning import WeightMasks

    every = list(matrices(loaded))
    if isinstance(asked, WeightMasks):
        asked.check(loaded)
        removed = {name: int((~own.mask).sum()) for name, own in asked.kept.items()}
        option = "--masks"
    else:
        chosen = asked.choose(every)
        removed = {m.name: round(asked.ratio * m.weight.numel()) for m in chosen}
        is_ratio = asked.pattern is None
        option = f"--ratio {asked.ratio:g}" if is_ratio else f"--pattern {asked.pattern}"
    least = 1.0
    for matrix in every:
        weight, more = matrix.weight, removed.get(matrix.name, 0)
        needed = least_zeros(weight)
        if more + weight.numel() - int(weight.count_nonzero()) >= needed:
            return
        least = min(least, needed / weight.numel())
    allowed = f"a share of about {math.ceil(1000 * least) / 1000:g} or more, or --stored dense"
    raise CommandError(f"{option}: too few zeros for sparse storage; allowed: {allowed}")


def _write(
    loaded: Any,
    found: "WeightMasks",
    path: str,
    out: Path | None,
    stored: Stored,
    save_masks: Path | None,
) -> dict[str, int]:
    """Writes masks and model as given; returns their sizes in bytes."""
    sizes = {}
    target = f"--save-masks {save_masks}"
    try:
        if save_masks is not None:
            found.save(save_masks)
            sizes["masks_bytes"] = save_masks.stat().st_size
        target = f"--out {out}"
        if out is not None:
            from fastskip.prompts import processor_for
            from fastskip.sparse import save_sparse

            with writing(out):
                if stored is Stored.SPARSE:
                    save_sparse(loaded, out)
                else:
                    loaded.save_pretrained(out)
                processor_for(path).save_pretrained(out)
            sizes["weights_bytes"] = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    except OSError as error:
        raise CommandError(f"{target}: {error}; allowed: a writable place") from error
    return sizes
