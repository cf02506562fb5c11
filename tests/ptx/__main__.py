"""Every operation at a real model's shapes, as the PTX of a tuning table, against fp64.

    python -m tests.ptx [--arch 90] [--table nvidia-h200] [--widths 7b] [--rows 1 16] [-k NAME]

What the cells ``correctness.ops`` of the GPU protocol check on a GPU, on a machine without one.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.gpu.correctness import DTYPES, cases, worst_output
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY
from fastskip.kernels import tuning
from fastskip.ops import compiled
from fastskip.wording import dtype_name
from tests.ptx.launches import executing

WIDTHS = {widths.name: widths for widths in (TINY, SEVEN, THIRTEEN)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="10 * major + minor (default: 90)")
    parser.add_argument("--table", default="nvidia-h200", help="of kernels/tables")
    parser.add_argument("--widths", choices=WIDTHS, default=SEVEN.name)
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")
    parser.add_argument("--dtype", default="bfloat16", choices=[*map(dtype_name, DTYPES)])
    parser.add_argument("-k", default="", metavar="NAME", help="operations whose name has this")
    chosen = parser.parse_args()
    widths, wrong = WIDTHS[chosen.widths], 0
    with executing(chosen.arch, widths is TINY), tuning.table(chosen.table):
        for name, maker, rows in cases(widths):
            if chosen.k not in name or (chosen.rows and rows not in chosen.rows):
                continue
            begin = time.perf_counter()
            try:
                found = worst_output(
                    compiled, maker, widths, rows, getattr(torch, chosen.dtype), torch.device("cpu")
                )
                share = found["share_of_allowed"]
                says = f"{share:.2f} of the allowed error"
                wrong += share > 1
            except Exception as error:
                notes = " ".join(getattr(error, "__notes__", ()))
                says = f"{type(error).__name__}: {error} {notes}"
                wrong += 1
            seconds = time.perf_counter() - begin
            print(f"{name}, {rows} rows: {says} ({seconds:.0f} s)", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
