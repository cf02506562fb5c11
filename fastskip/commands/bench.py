"""`fastskip bench`: how fast policies are here, against Hugging Face and the floors."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastskip.commands.common import (
    BandwidthOption,
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageOption,
    JsonOption,
    ModelOption,
    PoliciesOption,
    TflopsOption,
    ThreadsOption,
    ceilings_of,
    checkpoint,
    config_of,
    device_of,
    dtype_for,
    inputs_for,
    named_policies,
    pictures_of,
    prepare,
    reading,
)
from fastskip.commands.outputs import check_folder
from fastskip.commands.progress import steps_bar
from fastskip.json_file import json_text

FILE = "bench.json"
"""What `--out` writes."""


def bench(
    model: ModelOption = None,
    policies: PoliciesOption = None,
    image: ImageOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-q",
            metavar="TEXT",
            help="Time this prompt, about the images given. Default: a synthetic one.",
            show_default=False,
        ),
    ] = None,
    text_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Text tokens in the synthetic prompt, including the template's. Repeat the option "
            "for a batch of prompts of different lengths, padded on the left. Default: 64.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Copies of the prompt in a batch; with several prompts, copies of each.",
        ),
    ] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per answer.")] = 32,
    rounds: Annotated[
        int, typer.Option(min=3, metavar="N", help="Rounds; each times every contender once.")
    ] = 9,
    budget_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="S",
            help="Run only as many rounds as fit into this time, but at least three.",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--no-compiled",
            help="Also time Hugging Face with a static cache and torch.compile. Default: on CUDA.",
            show_default=False,
        ),
    ] = None,
    no_hf: Annotated[
        bool, typer.Option("--no-hf", help="Leave Hugging Face out: time only policies and dense.")
    ] = False,
    bandwidth: BandwidthOption = None,
    tflops: TflopsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help=f"Write DIR/{FILE}, which [bold]fastskip report[/] reads.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast policies are for your model, machine, batch size and lengths.

    Hugging Face's model, fastskip's dense model and all policies take turns in one process, on one
    set of weights; rounds start at different ones. First, the dense model's greedy tokens
    are compared with Hugging Face's: in float32 all must match, in half precision the matches are
    counted, because rounding decides near-ties. No token ends an answer early. Where prompts differ
    in length, only Hugging Face computes the padding. ([bold]fastskip verify[/] checks that a
    policy computes what it says.)

    TTFT: from the call to the first token, vision tower included. Prefill: the decoder's part of
    it. TPOT: the mean time of each further token, as a streamer sees it. Floors are the shortest
    times that this machine's memory bandwidth and arithmetic throughput allow; [italic]of ideal[/]
    is the measured gain over dense as a share of the gain in floor time.

    Gains over dense are computed per round, with 95 % intervals. An interval that contains 1 is
    "not told apart"; one below 1 is "slower here". More rounds narrow the intervals.

    [bold]Examples[/]

    [cyan]fastskip bench -p image_ffn -p every_nth_block[/] # the demo's model

    [cyan]fastskip bench -m llava-hf/llava-1.5-7b-hf -p mine.json --batch 4 --dtype bfloat16
    -o runs/bench[/]

    [cyan]fastskip bench -p image_ffn --text-tokens 16 --text-tokens 128[/] # two lengths

    [cyan]fastskip bench -m llava-hf/llava-1.5-7b-hf -i photo.jpg -q "what is this?"
    --budget-seconds 300[/]
    """
    prepare(threads)
    check_folder("--out", out)
    named = named_policies(policies)
    _check(prompt, text_tokens, no_hf, compiled)
    from fastskip.study.bench.contenders import Models
    from fastskip.study.bench.run import bench as measure
    from fastskip.study.bench.workload import repeated

    path = checkpoint(model)
    inputs = _inputs(path, image, prompt, text_tokens, new_tokens, is_demo=model is None)
    place = device_of(device)
    with reading(path):
        models = Models.load(path, dtype=dtype_for(model, dtype).value, device=place, hf=not no_hf)
    ceilings = ceilings_of(bandwidth, tflops, models.ours.dtype, device)
    is_compiled = not no_hf and (place.type == "cuda" if compiled is None else compiled)
    count = 1 + len(named) + (not no_hf) + is_compiled
    # nobody knows how many rounds fit into a budget
    total = count * (1 + rounds) if budget_seconds is None else None
    with steps_bar(total, "calls") as begin:
        found = measure(
            models,
            named,
            repeated(inputs, batch),
            ceilings,
            new_tokens=new_tokens,
            rounds=rounds,
            is_compiled=is_compiled,
            on_call=begin,
            **({} if budget_seconds is None else {"budget_s": budget_seconds}),
        )
    command = shlex.join(["fastskip", *sys.argv[1:]])
    found = replace(found, circumstances={**found.circumstances, "command": command})
    if as_json:
        typer.echo(json_text(found.to_dict(), indent=2))
    else:
        from fastskip.commands.bench_tables import show

        show(found)
    if out is not None:
        found.save(out)
        if not as_json:
            typer.echo(f"wrote {out / FILE}", err=True)


def _check(
    prompt: str | None, text_tokens: list[int] | None, no_hf: bool, compiled: bool | None
) -> None:
    if prompt is not None and text_tokens:
        raise CommandError(f"--text-tokens {text_tokens}: allowed: only without --prompt")
    if no_hf and compiled:
        raise CommandError("--compiled: times Hugging Face's model; allowed: only without --no-hf")


def _inputs(
    path: str,
    images: list[Path] | None,
    prompt: str | None,
    text_tokens: list[int] | None,
    new_tokens: int,
    *,
    is_demo: bool,
) -> Any:
    """The prompt given or a synthetic one; built before the weights load, so errors come early."""
    from fastskip.families import shape_of
    from fastskip.prompts import processor_for
    from fastskip.study.bench.workload import drawn_image, padded, synthetic_inputs

    pictures = pictures_of(images)
    if prompt is not None:
        return inputs_for(path, prompt, pictures, new_tokens)[1]
    config, processor = config_of(path), processor_for(path)
    if not pictures and shape_of(config).has_images:
        pictures = [drawn_image(None) if is_demo else drawn_image()]
    every = [
        synthetic_inputs(processor, config, pictures, text_tokens=count, new_tokens=new_tokens)
        for count in text_tokens or [64]
    ]
    return every[0] if len(every) == 1 else padded(every)
