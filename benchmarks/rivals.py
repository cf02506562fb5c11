"""Alternatives to policies: smaller images and a smaller language model, on the search's items.

python -m benchmarks.rivals prints the two rows of the README's table of methods at equal cost.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fastskip
from fastskip.commands.demo_items import demo_tasks
from fastskip.demo import checkpoint_path
from fastskip.demo.model import Size
from fastskip.demo.smaller import write_checkpoint
from fastskip.prompts import processor_for
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.judging import Judgement, judge
from fastskip.study.evaluation.smaller_images import shrunk_processor

ITEMS = 200


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge both against the bundled model, in float32 on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    about = f"number of evaluation items (default: {ITEMS}, as in the README)"
    parser.add_argument("--count", type=int, default=ITEMS, metavar="N", help=about)
    items = demo_tasks(parser.parse_args(arguments).count)
    processor = processor_for(str(checkpoint_path()))
    model = fastskip.load_model(checkpoint_path(), "dense", dtype="float32", device="cpu")
    exam = Exam(items, processor, config=model.config, batch_size=16)
    half = Exam(items, shrunk_processor(processor, 2), config=model.config, batch_size=16)
    dense, images = judge(model, [], exam, smaller={2: half})
    _show("images of half the side", images, dense)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Size.MEDIUM, Path(folder))
        smaller = fastskip.load_model(folder, "dense", dtype="float32", device="cpu")
        own = Exam(items, processor_for(folder), config=smaller.config, batch_size=16)
        (found,) = judge(smaller, [], own)
    _show("a smaller language model", found, dense)


def _show(label: str, found: Judgement, dense: Judgement) -> None:
    mean, interval = found.evaluation.minus(dense.evaluation).in_points
    assert found.speed is not None and dense.speed is not None
    ttft = dense.speed.ttft_s / found.speed.ttft_s
    tpot = dense.speed.tpot_s / found.speed.tpot_s
    cost = f"{found.flops / dense.flops:.0%} of the FLOPs, TTFT {ttft:.2f}x, TPOT {tpot:.2f}x"
    print(f"{label}: {cost}, {mean} ({interval}) points")


if __name__ == "__main__":
    main()
