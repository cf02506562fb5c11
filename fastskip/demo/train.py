"""Command line of the recipe; see `--help`."""

import argparse
from dataclasses import replace
from pathlib import Path

from fastskip.demo.export import export
from fastskip.demo.model import Size
from fastskip.demo.precision import Precision
from fastskip.demo.recipe import SMALLER_STAGES, STAGES, Run, Trainer
from fastskip.demo.smaller import save_without_tower
from fastskip.demo.team import Team, work_together
from fastskip.demo.text import build_processor

DESCRIPTION = """\
Train the demo's LLaVA on generated scenes of coloured shapes, in three stages:
  vision    the vision encoder predicts colour, shape, row and column of each patch
  language  projector and language model learn to answer; the encoder is frozen
  all       everything together, at a lower rate
Smaller language models use the bundled vision tower, frozen, and run the language stage twice, the
second time at a lower rate and for as many steps as "all" has.
Every step draws fresh scenes, determined by the seed.
"""
EPILOG = """\
examples:
  python -m fastskip.demo.train --out runs/shapes                 the bundled checkpoint
  python -m fastskip.demo.train --out runs/shapes --minutes 20    stop after 20 minutes;
                                                                  run it again to resume
  python -m fastskip.demo.train --out runs/medium --size medium   a smaller language model
  python -m fastskip.demo.train --out runs/smoke --steps 3        a quick trial

OUT/state.pt is written every 100 steps and after each stage; a run resumes from it.
OUT/checkpoint is an ordinary Hugging Face folder, written when the last stage is done or the
minutes are up. For a smaller model, OUT/SIZE.safetensors holds projector and language model alone,
as bundled with the package.
"""


def at_least_one(text: str) -> int:
    """The number that an option gives."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text}; allowed: a whole number from 1")
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastskip.demo.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="weights and data (default: 0)")
    parser.add_argument(
        "--size",
        choices=[size.label for size in Size],
        default=Size.LARGE.label,
        help="of the language model (default: large)",
    )
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.AUTO.value,
        help="of multiplies (default: auto, bfloat16 where this processor is fast at it)",
    )
    parser.add_argument("--steps", type=at_least_one, help="at most this many steps in each stage")
    parser.add_argument("--minutes", type=float, help="stop after this long; run again to resume")
    parser.add_argument("--batch", type=at_least_one, help="scenes per step, in every stage")
    parser.add_argument(
        "--processes",
        type=at_least_one,
        default=2,
        help="one per CPU core; they share each batch (default: 2)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    size = Size[options.size.upper()]
    stages = tuple(
        replace(
            stage,
            steps=min(stage.steps, options.steps or stage.steps),
            batch=options.batch or stage.batch,
        )
        for stage in (STAGES if size is Size.LARGE else SMALLER_STAGES)
    )
    run = Run(
        options.out,
        seed=options.seed,
        size=size,
        has_bundled_tower=size is not Size.LARGE,
        precision=Precision(options.precision),
        stages=stages,
        minutes=options.minutes,
    )
    work_together(options.processes, train, run)


def train(team: Team, run: Run) -> None:
    """What each process does; the first one writes."""
    processor = build_processor()
    trainer = Trainer(run, processor.tokenizer, team)
    is_done = trainer.train()
    if team.is_first:
        export(trainer.model, processor, run.folder / "checkpoint")
        if run.has_bundled_tower:
            path = run.folder / f"{run.size.label}.safetensors"
            save_without_tower(trainer.model.state_dict(), path)
        outcome = "done" if is_done else "time is up, run again to resume"
        print(f"{outcome}: {run.folder / 'checkpoint'}")


if __name__ == "__main__":
    main()
