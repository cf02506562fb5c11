"""What a profiler sees of a prepared model.

``with ranges(): model.generate(...)`` puts a range around every phase, layer and sublayer, so that
Nsight Systems, Nsight Compute (``--nvtx``) and ``torch.profiler`` show which of them time goes to.
"""

from fastskip.ops.ranges import ranges

__all__ = ["ranges"]
