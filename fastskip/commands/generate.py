"""`fastskip generate`: answer a prompt about images, and say how fast."""

from typing import Annotated

import typer

from fastskip.commands.common import (
    CommandError,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageOption,
    ModelOption,
    PolicyOption,
    ThreadsOption,
    checkpoint,
    dtype_for,
    inputs_for,
    load,
    pictures_of,
    policy_of,
    prepare,
)

MAX_SEED = (1 << 64) - 1
"""The largest that torch accepts."""


def generate(
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-q",
            metavar="TEXT",
            help="The question. <image> marks where an image goes; by default images come first.",
        ),
    ],
    model: ModelOption = None,
    image: ImageOption = None,
    policy: PolicyOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum tokens of the answer.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0: greedy decoding; above 0: sampling.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Makes sampling repeatable.", show_default=False),
    ] = None,
    warmup: Annotated[
        bool, typer.Option("--warmup", help="Run once untimed first: kernels compile on first use.")
    ] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer a question about images, streamed to stdout; the times go to stderr.

    TTFT is the time to the first token (vision tower and prefill), TPOT the mean time per further
    token.

    [bold]Example[/]

    [cyan]fastskip generate -m llava-hf/llava-1.5-7b-hf -i cat.jpg -q "What is it doing?"
    -p image_ffn[/]
    """
    prepare(threads)
    if seed is not None and seed > MAX_SEED:
        raise CommandError(f"--seed {seed}: allowed: 0 to {MAX_SEED}")
    path, chosen = checkpoint(model), policy_of(policy)
    processor, inputs = inputs_for(path, prompt, pictures_of(image), max_new_tokens)
    prepared = load(path, chosen, dtype_for(model, dtype), device)

    import fastskip
    from fastskip.commands.streaming import stream

    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | sampling
    tokenizer = getattr(processor, "tokenizer", processor)
    if warmup:
        stream(prepared, tokenizer, inputs, options, seed, silent=True)
    times = stream(prepared, tokenizer, inputs, options, seed)
    name = fastskip.plan_of(prepared).name
    typer.secho(f"{times.summary()}, policy {name}", dim=True, err=True)
