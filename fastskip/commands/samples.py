"""What a command calibrates on: a user's sample file, or the demo's own training images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastskip.commands.common import CommandError

SamplesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='JSON lines: {"prompt": "What is this?", "image": "cat.jpg"}, or the questions of '
        "eval; the image is optional. Default, for the demo's model only: its own training "
        "images.",
        show_default=False,
    ),
]


def calibration_inputs(
    model: str | None,
    path: str,
    config: Any,
    samples: Path | None,
    images: Path | None,
    count: int,
    new_tokens: int,
) -> tuple[list[Any], str]:
    """The inputs to run, and where they come from."""
    from fastskip.prompts import processor_for
    from fastskip.study.samples import inputs_of, read_samples

    processor = processor_for(path)
    if samples is not None:
        chosen = read_samples(samples, images)[:count]
        return inputs_of(chosen, processor, config, new_tokens), str(samples)
    if images is not None:
        raise CommandError(f"--images {images}: not used without --samples; allowed: with it")
    from fastskip.demo import checkpoint_path

    if Path(path).resolve() != checkpoint_path().resolve():
        raise CommandError(f"--samples: needed with --model {model}; allowed: a JSON lines file")
    from fastskip.demo.evaluation import held_out
    from fastskip.demo.scenes import Split, draw
    from fastskip.prompts import build_inputs

    items = held_out(count, split=Split.TRAIN)
    made = [
        build_inputs(
            processor, question.text, [draw(scene)], config=config, max_new_tokens=new_tokens
        )
        for scene, question in items
    ]
    return made, "demo, training pictures"
