"""`fastskip verify`: does the skipping model compute what its policy says?"""

from typing import Annotated

import typer

from fastskip.commands.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageOption,
    ModelOption,
    PolicyOption,
    ThreadsOption,
    checkpoint,
    config_of,
    dtype_for,
    inputs_for,
    load_plain,
    pictures_of,
    prepare,
    resolve_policy,
)

EXIT_FAILED = 1


def verify(
    prompt: Annotated[
        str, typer.Option("--prompt", "-q", metavar="TEXT", help="The question to check it on.")
    ] = "describe the image",
    model: ModelOption = None,
    image: ImageOption = None,
    policy: PolicyOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate and check.")
    ] = 16,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Check that a model under a policy computes what the policy says, on your own input.

    Compares the runtime, row by row and token by token, with Hugging Face's model under masked
    sublayer outputs; errors as large as Hugging Face's own rounding are allowed. Needs the memory
    of a few copies of the model. Exit code 0: it holds, 1: it does not, 2: it could not be checked,
    for example because the input has no rows that the policy affects. Without [cyan]-i[/], the
    demo's model gets a generated scene.

    [bold]Example[/]

    [cyan]fastskip verify -m llava-hf/llava-1.5-7b-hf -i cat.jpg -q "What is this?" -p mine.json[/]
    """
    prepare(threads)
    path = checkpoint(model)
    config = config_of(path)
    chosen = resolve_policy(policy, path, config)
    pictures = pictures_of(image)
    is_drawn = model is None and not pictures
    if is_drawn:
        from fastskip.study.bench.workload import drawn_image

        pictures = [drawn_image(size=None)]
    _, inputs = inputs_for(path, prompt, pictures, max_new_tokens)

    from fastskip.verification.check import verify as check

    plain = load_plain(path, config, dtype_for(model, dtype), device)
    report = check(plain, chosen, inputs, max_new_tokens=max_new_tokens)
    typer.secho(str(report), fg=None if report.holds else "red")
    if is_drawn:
        typer.echo("  image: a generated scene; pass your own with -i FILE")
    if not report.holds:
        raise typer.Exit(EXIT_FAILED)
