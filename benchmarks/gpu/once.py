"""Runs every operation with our kernels, for NVIDIA's profiler and memory checker.

python -m benchmarks.gpu.once {tiny,7b,13b} ROWS [NAME ...]

Runs decode operations for ROWS sequences and, if ROWS is 1, those of a prefill. NAME: only these.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.gpu.half_works import DECODE_HALVED
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Maker
from benchmarks.gpu.prefill_works import PREFILL
from benchmarks.gpu.routed_works import DECODE_ROUTED, PREFILL_ROUTED
from benchmarks.gpu.works import DECODE, DECODE_ARRANGED

SIZES = {widths.name: widths for widths in (TINY, SEVEN, THIRTEEN)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs each operation twice, because the first call may compile."""
    from fastskip.ops import compiled

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.once", description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("rows", type=int)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args(arguments)
    widths = SIZES[options.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    decode = DECODE | DECODE_ARRANGED | DECODE_HALVED | DECODE_ROUTED
    works = {(name, options.rows): make for name, make in decode.items()}
    if options.rows == 1:
        works |= {(name, widths.context): make for name, make in (PREFILL | PREFILL_ROUTED).items()}
    for (name, rows), make in works.items():
        if options.names and name not in options.names:
            continue
        work = make(Maker(widths, dtype, device), rows)
        for _ in range(2):
            work.run(compiled)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{name}, {rows} rows: run", flush=True)


if __name__ == "__main__":
    main()
