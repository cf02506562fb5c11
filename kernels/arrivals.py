"""Detects the last of the programs that share a task: it may use what all of them have stored.

``arrivals`` holds int32 counters that start at zero and are reset to zero; launches that share them
must run one after another.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(arrivals_ptr, programs):
    """Whether all ``programs`` have called this; each calls it once, after storing its share."""
    # One thread does the atomic; without the barrier it would not publish the others' stores.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    tl.store(arrivals_ptr, 0, mask=arrived == programs - 1)
    return arrived == programs - 1
