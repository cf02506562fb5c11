"""How fast a policy is: against Hugging Face, against our own dense model, and against the floor.

    pytest benchmarks/ --benchmark-only                   # half an hour on two cores
    pytest benchmarks/ --benchmark-only -m full           # the long form
    pytest benchmarks/ --benchmark-only --save-results    # writes benchmarks/results/<machine>.json
    python -m benchmarks.report benchmarks/results/<machine>.json

**A case** is a model shape, a dtype, a batch size, and prompt and answer lengths. All its peers
share one set of weights in memory and run round-robin, in an order that rotates from round to
round, so that other load on the machine slows them all alike. Each `generate` call yields one
sample for each of three groups, timestamped from inside the call:

    prefill  from the entry into the decoder to the first token: decoder and lm_head, no vision
    decode   the median gap between two tokens
    e2e      the whole call: processor outputs in, tokens out, vision tower included

pytest-benchmark times one function at a time and cannot interleave. So the first item of a case
to run measures the whole case (`harness.measure`), and each item (case x group x peer) replays its
own samples: its timer, set by the `timer` option of the `benchmark` marker, is a `ReplayClock`
that each round advances by the next recorded duration. The statistics, comparison and JSON of
pytest-benchmark thus work on the interleaved samples.

**Threads.** Hugging Face and our dense model are tried with torch's default number of threads and
with one. A setting that is far behind in this trial is dropped and the others are timed; policies
run with the settings kept for our dense model. The faster setting counts, for a peer as for the
baselines; `threads` says which it was.

**Gate.** No peer is timed before its outputs are known to be correct (`gate`). A peer that fails
the gate fails all its items.

**Floors** come from `fastskip.plan.costs`, with ceilings measured in the same run and with the same
number of threads. `share_of_ideal` is the measured speed-up over our own dense model divided by
floor(dense) / floor(policy). It is omitted for e2e (vision has no floor) and for arrangements
(they save launches, which these floors do not count). A model that fits in the processor's
caches may beat its floor.
"""
