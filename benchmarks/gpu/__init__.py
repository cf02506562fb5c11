"""The GPU protocol: everything that has to be measured on a card, in one run of 23 minutes.

    python -m benchmarks.gpu                     # the default cells, in order, then a table
    python -m benchmarks.gpu --budget 9          # in pieces: goes on where the last one stopped
    python -m benchmarks.gpu e2e.13b tune        # cells by name; a name's front part is enough
    python -m benchmarks.gpu --list              # all cells, what they do, what is done already
    python -m benchmarks.gpu --tiny              # everything in small on the CPU, as CI does

**A cell** is one measurement that can run alone. As soon as it is done it writes one line into
``benchmarks/results/<gpu>/results.jsonl`` (``results``), and a cell that has its line is skipped,
so the same command continues an interrupted run. A cell that fails leaves its traceback in its
line, the next one runs, and the next run tries it again.

**Processes.** The cells of one group run in one process of their own (``running``). Where a kernel
hangs or leaves the device unusable that process is ended, the line says so, and the rest goes on
in a new one.

**Order.** ceilings, correctness, tune, e2e, routing, profile: later cells use what earlier ones
leave.
Shares of floors refer to the measured ceilings, and end to end runs on the tuned tables. What an
earlier cell would have left and did not is measured on the spot, or done without.

**Timing.** Kernels by replays of a CUDA graph that holds a call for each of several copies of the
weights, more than the L2 cache holds (``timing``). End to end by the wall clock around
``generate`` and a streamer that notes when tokens reach the host: no hooks and no waits inside,
contenders in turn, in an order that moves on from round to round, medians. Time per token is the
median gap between two tokens.
"""
