"""Who of the programs that share a task is the last one, and may go on with what all have left.

``arrivals`` counts in int32, from zero, and is left zero; launches that share it must follow one
another.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(arrivals_ptr, programs):
    """Whether all others of so many programs have asked; each asks once, when it has stored its
    share."""
    # The atomic is one thread's: it publishes the stores of the others only after this.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    tl.store(arrivals_ptr, 0, mask=arrived == programs - 1)
    return arrived == programs - 1
