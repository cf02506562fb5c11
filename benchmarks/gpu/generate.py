"""One `generate` call of a random-weight model, to profile with Nsight.

python -m benchmarks.gpu.generate {7b,13b,tiny} BATCH POLICY [--ranges]

The profiled call is between cudaProfilerStart and cudaProfilerStop, after one that compiles:

    nsys profile --trace=cuda,nvtx --cuda-graph-trace=node --capture-range=cudaProfilerApi \\
        python -m benchmarks.gpu.generate 7b 1 dense
    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi \\
        python -m benchmarks.gpu.generate 7b 1 dense --ranges
    ncu --clock-control none --profile-from-start off --kernel-name 'regex:^_.*_kernel$' \\
        --launch-count 40 python -m benchmarks.gpu.generate 7b 1 dense
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

import torch

import fastskip
from benchmarks.gpu.models import load, policies, shape
from benchmarks.gpu.once import SIZES
from benchmarks.shapes import prompts
from fastskip.profiling import ranges


def main(arguments: Sequence[str] | None = None) -> None:
    """Generates twice; the profiler sees the second call."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("batch", type=int)
    parser.add_argument("policy", choices=policies(8))
    parser.add_argument("--new", type=int, default=8, help="new tokens (8)")
    parser.add_argument("--ranges", action="store_true", help="name phases, layers and sublayers")
    options = parser.parse_args(arguments)
    is_gpu = torch.cuda.is_available()
    device = "cuda" if is_gpu else "cpu"
    widths = SIZES[options.size]
    both = load(widths, torch.bfloat16, device, None if is_gpu else "torch")
    model = fastskip.set_policy(both.ours, policies(both.depth)[options.policy])
    inputs = prompts(both.hf, shape(widths, device), options.batch)
    for is_seen in (False, True):
        with ranges() if options.ranges else nullcontext():
            if is_seen and is_gpu:
                torch.cuda.cudart().cudaProfilerStart()
            model.generate(**inputs, max_new_tokens=options.new, do_sample=False)
            if is_gpu:
                torch.cuda.synchronize()
    if is_gpu:
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
