"""How fast a policy really is: against Hugging Face, against ourselves, against the floor.

    pytest benchmarks/ --benchmark-only                   # ten minutes on two cores
    pytest benchmarks/ --benchmark-only -m full           # the long form
    pytest benchmarks/ --benchmark-only --save-results    # keeps benchmarks/results/<machine>.json
    python -m benchmarks.report benchmarks/results/<machine>.json

**A case** is a model shape, a dtype, a batch and the lengths of prompt and answer. All its peers
run on the same weights in the same memory, round-robin, in an order that rotates from round to
round, so that a neighbour who slows the machine down slows all of them. One `generate` call gives
one sample of each of the three groups, by time stamps from inside it:

    prefill  from the entry into the decoder to the first token: decoder and lm_head, no vision
    decode   the median gap between two tokens
    e2e      the whole call: processor outputs in, tokens out, vision tower included

pytest-benchmark times one function at a time and cannot interleave. So the first item of a case
that is reached measures the whole case (`harness.measure`), and each item (case x group x peer)
plays its own samples back: its timer is a `ReplayClock`, a documented option of the `benchmark`
marker, that each round moves on by the next recorded duration. Statistics, comparison and JSON of
pytest-benchmark thus work on the interleaved samples.

**Threads.** Hugging Face and our dense model are tried with torch's default number of threads and
with one. A setting far behind in that trial is dropped, the others are timed, our policies with
those of our dense model. Of what was timed the better setting counts, for a peer as for the
baselines; `threads` says which it was.

**Gate.** No peer is timed before its numbers are right (`gate`). One that fails the gate fails all
its items.

**Floors** are those of `fastskip.costs`, with ceilings measured in the same run and with the same
number of threads. `share_of_ideal` is the measured speed-up over our own dense divided by
floor(dense) / floor(policy). It is left out for e2e (vision has no floor) and for arrangements
(they save launches, which these floors do not count). A model that fits into the processor's
caches may beat its floor.
"""
