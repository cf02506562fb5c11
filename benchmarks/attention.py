"""Attention of a prompt on a CPU: torch's fused kernel against blocks of queries.

    python -m benchmarks.attention            # a minute; --cpu-time on a busy machine

Prints both times and which form the runtime takes here: medians, calls taken in turn. Shapes are
query rows on as many or more slots of the cache, causal, of one sequence.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastskip.ops.attention import attend, attend_fused, attend_in_blocks, reads_in_place
from fastskip.timing import rotated, threads_set
from fastskip.wording import dtype_name, significant

HEADS = {"0.5b": (16, 16, 64), "14 heads on 2": (14, 2, 64), "7b": (32, 32, 128)}
"""Query heads, key heads and head dim."""
ROWS = ((1, 620), (44, 620), (128, 620), (310, 620), (620, 620), (1500, 1500))
DTYPES = (torch.float32, torch.bfloat16)
LATER = 128
"""Slots for the answer."""
ROUNDS = 9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[torch.get_num_threads(), 1])
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time of one thread, which other programs disturb less",
    )
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    for threads in [1] if options.cpu_time else dict.fromkeys(options.threads):
        print(f"\n{threads} threads: blocks, ms / fused, ms / gain (* what the runtime takes)")
        print(f"{'rows on slots':<30}" + "".join(f"{f'{n} on {s}':>24}" for n, s in ROWS))
        with threads_set(threads), torch.inference_mode():
            for name, heads in HEADS.items():
                for dtype in DTYPES:
                    cells = [_cell(heads, *rows, dtype, clock) for rows in ROWS]
                    label = f"{name}, {dtype_name(dtype)}"
                    print(f"{label:<30}" + "".join(cells), flush=True)


def _cell(
    heads: tuple[int, int, int],
    rows: int,
    slots: int,
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> str:
    n_query, n_key, width = heads
    # As the decoder has them: packed queries turned, keys as they lie in the cache, ahead of slots
    # for the answer where these are in the same segment.
    queries = torch.randn(1, rows, n_query, width).to(dtype).transpose(1, 2)
    later = LATER if reads_in_place(queries) else 0
    key, value = (
        torch.randn(1, n_key, slots + later, width).to(dtype)[:, :, :slots] for _ in range(2)
    )
    forms: list[Callable[..., Tensor]] = [attend_in_blocks, attend_fused]
    times: dict[Callable[..., Tensor], list[float]] = {form: [] for form in forms}
    for number in range(ROUNDS + 1):
        for form in rotated(forms, number):
            begin = clock()
            form(queries, [key], [value], None, is_causal=True, scale=width**-0.5)
            if number:
                times[form].append(clock() - begin)
    blocks, fused = (statistics.median(times[form]) for form in forms)
    marks = ("", "*") if _takes_fused(queries, key) else ("*", "")
    both = f"{significant(1e3 * blocks)}{marks[0]} / {significant(1e3 * fused)}{marks[1]}"
    found = f"{both} / {blocks / fused:.2f}x"
    return f"{found:>24}"


def _takes_fused(queries: Tensor, key: Tensor) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(queries, [key], [key], None, is_causal=True, scale=1.0)
    return any("scaled_dot_product" in event.key for event in profile.key_averages())


if __name__ == "__main__":
    main()
