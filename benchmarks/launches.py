"""The README's table of launches: python -m benchmarks.launches

Counted, not predicted: the executor runs on tensors without data (``fastskip.launches``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastskip.launches import decode_launches, prefill_launches
from fastskip.plan import ModelShape, make_plan
from fastskip.policy import SkipPolicy

TABLE = "nvidia-h200"
BEGIN, END = "<!-- launches -->", "<!-- end of launches -->"
LLAVA_7B = ModelShape(
    depth=32,
    hidden_size=4096,
    ffn_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    has_images=True,
    dtype_bytes=2,
    max_positions=4096,
)
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
