"""Profiler ranges for prepared models.

``with ranges(): model.generate(...)`` puts a range around every phase, layer and sublayer, so that
Nsight Systems, Nsight Compute (``--nvtx``) and ``torch.profiler`` show where the time goes.
"""

from fastskip.ops.ranges import ranges

__all__ = ["ranges"]
