"""Products on a CPU: plain library calls against the forms that the runtime uses.

    python -m benchmarks.products                    # fp32, two minutes
    python -m benchmarks.products --dtype bfloat16

Prints both times and their ratio for decoder shapes and row counts: medians, calls taken in turn.
Weights are read from memory, as a model's are: together they exceed every cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.contracts import Activation, Linear
from fastskip.ops.products import feed_forward, linear
from fastskip.ops.reference import gated_silu
from fastskip.timing import rotated, threads_set
from fastskip.wording import significant

SHAPES = {
    "0.5b: q, k, v": (3072, 1024),
    "0.5b: gate, up": (5632, 1024),
    "0.5b: down": (1024, 2816),
    "7b: gate or up": (11008, 4096),
    "7b: output": (4096, 4096),
    "head of 32,064 words": (32064, 1024),
}
FFN = ("0.5b: whole FFN", (2816, 1024))
ROWS = (1, 2, 4, 8, 16, 48, 155, 310, 620)
DTYPES = ("float32", "bfloat16", "float16")
MOST_OPERATIONS = 2e10
ROUNDS = 7
MEMORY = 1 << 28
"""Bytes of weights that the calls cycle through."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[torch.get_num_threads(), 1])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    dtype: torch.dtype = getattr(torch, options.dtype)
    for threads in dict.fromkeys(options.threads):
        print(f"\n{threads} threads: F.linear, ms / ours, ms / gain")
        print(f"{'out x in':<28}" + "".join(f"{f'{rows} rows':>22}" for rows in options.rows))
        with threads_set(threads), torch.inference_mode():
            for name, shape in SHAPES.items():
                _print(name, shape, [_cell(*shape, rows, dtype) for rows in options.rows])
            name, shape = FFN
            _print(name, shape, [_ffn_cell(*shape, rows, dtype) for rows in options.rows])


def _print(name: str, shape: tuple[int, int], cells: Sequence[str]) -> None:
    print(f"{name:<15}{f'{shape[0]} x {shape[1]}':<13}" + "".join(cells), flush=True)


def _cell(n_out: int, n_in: int, rows: int, dtype: torch.dtype) -> str:
    if 2.0 * n_out * n_in * rows > MOST_OPERATIONS:
        return f"{'':>22}"
    x, weights = torch.randn(rows, n_in).to(dtype), cycle(_drawn(n_out, n_in, dtype))
    return _compared([lambda: F.linear(x, next(weights)), lambda: linear(x, next(weights), None)])


def _ffn_cell(inner: int, width: int, rows: int, dtype: torch.dtype) -> str:
    """An FFN with its activation."""
    x = torch.randn(rows, width).to(dtype)
    both = (_drawn(2 * inner, width, dtype), _drawn(width, inner, dtype))
    pairs = cycle(list(zip(*both, strict=False)))

    def plain() -> object:
        up, down = next(pairs)
        return F.linear(gated_silu(F.linear(x, up)), down)

    def ours() -> object:
        up, down = next(pairs)
        return feed_forward(x, Linear(up), Activation.GATED_SILU, Linear(down))

    return _compared([plain, ours])


def _drawn(n_out: int, n_in: int, dtype: torch.dtype) -> list[Tensor]:
    """Random weights of one shape, more than a cache holds; an odd number of them, so that both
    forms get to use each."""
    count = MEMORY // (dtype.itemsize * n_out * n_in) // 2 * 2 + 1
    return [torch.randn(n_out, n_in).to(dtype) for _ in range(max(3, count))]


def _compared(calls: Sequence[Callable[[], object]]) -> str:
    plain, ours = medians(calls)
    return f"{f'{significant(1e3 * plain)} / {significant(1e3 * ours)} / {plain / ours:.2f}x':>22}"


def medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, measured in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 1):
        for place in rotated(range(len(calls)), number):
            begin = time.perf_counter()
            calls[place]()
            if number:
                times[place].append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    main()
