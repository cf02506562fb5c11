"""Every operation at a real model's shapes, as the PTX of a tuning table, against fp64.

    python -m tests.ptx [--arch 90] [--table nvidia-h200] [--widths 7b] [--rows 1 16] [-k NAME]
    python -m tests.ptx --candidates --widths small

What the cells ``correctness.ops`` of the GPU protocol check on a GPU, on a machine without one.
``--candidates``: each operation under every configuration that tuning would time, since tuning does
not judge results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.correctness import DTYPES, cases, worst_output
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Maker, Widths
from benchmarks.gpu.tables import Config, Question
from benchmarks.gpu.tune import answering, asked_by, candidates_of
from benchmarks.gpu.works import Work
from fastskip.kernels import tuning
from fastskip.ops import compiled
from fastskip.wording import dtype_name
from tests.ptx.launches import executing

# Several turns of every pipeline, and no size a multiple of a block's.
SMALL = Widths("small", 1088, 8, 4, 128, 1304, 520, 2, n_image=45, n_text=24)
WIDTHS = {widths.name: widths for widths in (TINY, SMALL, SEVEN, THIRTEEN)}
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="10 * major + minor (default: 90)")
    parser.add_argument("--table", default="nvidia-h200", help="of kernels/tables")
    parser.add_argument("--widths", choices=WIDTHS, default=SEVEN.name)
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows (default: all)")
    parser.add_argument("--dtype", default="bfloat16", choices=[*map(dtype_name, DTYPES)])
    parser.add_argument("-k", default="", metavar="NAME", help="operations whose name has this")
    parser.add_argument(
        "--candidates", action="store_true", help="under every configuration that tuning would time"
    )
    chosen = parser.parse_args()
    widths, wrong = WIDTHS[chosen.widths], 0
    dtype = getattr(torch, chosen.dtype)
    done: set[Question] = set()
    with executing(chosen.arch, widths is TINY), tuning.table(chosen.table):
        for name, maker, rows in cases(widths):
            if chosen.k not in name or (chosen.rows and rows not in chosen.rows):
                continue
            compute = partial(worst_output, compiled, maker, widths, rows, dtype, CPU)
            if not chosen.candidates:
                wrong += _report(f"{name}, {rows} rows", compute)
                continue
            for question, config in _others(maker(Maker(widths, dtype, CPU), rows), done):
                with answering({question: config}):
                    wrong += _report(f"{name}, {rows} rows, {question.kernel} {config}", compute)
    return int(wrong > 0)


def _others(work: Work, done: set[Question]) -> Iterator[tuple[Question, Config]]:
    """What may be asked while an operation runs, and each answer besides the one in use."""
    for question, current in asked_by(work, {}).items():
        if question not in done:
            done.add(question)
            yield from ((question, other) for other in candidates_of(question, current)[1:])


def _report(what: str, compute: partial[dict[str, float]]) -> bool:
    """Prints how large the worst error is; whether something is wrong."""
    begin = time.perf_counter()
    try:
        share = compute()["share_of_allowed"]
        says, is_wrong = f"{share:.2f} of the allowed error", share > 1
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        says, is_wrong = f"{type(error).__name__}: {error} {notes}", True
    print(f"{what}: {says} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return is_wrong


if __name__ == "__main__":
    raise SystemExit(main())
