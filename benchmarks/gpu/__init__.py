"""The GPU protocol: everything that needs a GPU to be measured, in one run of 23 minutes.

    python -m benchmarks.gpu                     # the default cells in order, then the tables
    python -m benchmarks.gpu --budget 9          # in pieces: resumes where the last run stopped
    python -m benchmarks.gpu e2e.13b tune        # cells by name, or by the leading part of a name
    python -m benchmarks.gpu --list              # all cells, what they do, and which are done
    python -m benchmarks.gpu --tiny              # everything at tiny shapes on the CPU, as in CI

**A cell** is one measurement that can run alone. When it finishes, it writes one line to
``benchmarks/results/<gpu>/results.jsonl`` (``results``). Cells that already have a line are
skipped, so the same command resumes an interrupted run. A cell that fails records its traceback
in its line; the remaining cells run, and the next run retries it.

**Processes.** Each group of cells runs in its own process (``running``). If a kernel hangs or
leaves the device unusable, that process is killed, the line says so, and a new process runs the
remaining cells.

**Order.** ceilings, correctness, tune, e2e, routing, profile: later cells use the results of
earlier ones. Shares of floors refer to the measured ceilings, and end-to-end runs use the tuned
tables. What an earlier cell has not left is measured on the spot or done without.

**Timing.** Kernels: replays of a CUDA graph with a call for each of several copies of the weights,
which together exceed the L2 cache (``timing``). End to end: the wall clock around ``generate`` and
a streamer that notes when tokens reach the host, without hooks or synchronization inside;
contenders run in turn, in an order that rotates every round; medians. Time per token is the median
gap between two tokens.
"""
