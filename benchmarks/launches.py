"""The README's table of launches: python -m benchmarks.launches

Counted, not predicted: the executor runs on tensors without data (``fastskip.launches``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.gpu.inputs import SEVEN
from fastskip.launches import decode_launches, prefill_launches
from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy

TABLE = "nvidia-h200"
BEGIN, END = "<!-- launches -->", "<!-- end of launches -->"
LLAVA_7B = SEVEN.model_shape(torch.bfloat16)
POLICIES = {
    "dense": SkipPolicy(),
    "every 2nd block skipped": SkipPolicy.preset("every_nth_block", interval=2),
    "no FFN for image rows": SkipPolicy.preset("image_ffn"),
    "image rows frozen": SkipPolicy.preset("frozen_visual"),
    "parallel blocks, shared norm": SkipPolicy.preset("parallel_blocks", norm="shared"),
    "pairs of blocks": SkipPolicy.preset("block_pairs"),
}


def markdown() -> str:
    """Launches (thread blocks) of one prompt, and of one step at batch 1 and 16."""
    lines = [
        "| launches (thread blocks) | prompt | step, batch 1 | step, batch 16 |",
        "|---|---:|---:|---:|",
    ]
    for name, policy in POLICIES.items():
        plan = make_plan(policy, LLAVA_7B)
        counts = (
            prefill_launches(plan, 576, 64, 1, TABLE),
            decode_launches(plan, 1, 1024, TABLE),
            decode_launches(plan, 16, 1024, TABLE),
        )
        cells = [f"{count.launches} ({count.programs})" for count in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.parse_args(arguments)
    print(markdown())


if __name__ == "__main__":
    main()
