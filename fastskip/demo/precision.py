"""The number format that training multiplies in: bfloat16 where the processor is fast at it.

Processors without bfloat16 instructions widen every number first and take several times as long as
in float32.
"""

import time
from enum import StrEnum
from functools import cache

import torch


class Precision(StrEnum):
    """AUTO multiplies a small matrix in both formats and takes the faster one."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    def is_bfloat16(self) -> bool:
        """Whether to multiply in bfloat16 on this machine."""
        return _is_bfloat16_faster() if self is Precision.AUTO else self is Precision.BFLOAT16


@cache
def _is_bfloat16_faster() -> bool:
    return _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype, size: int = 384, rounds: int = 5) -> float:
    """The shortest time of several products of two square matrices."""
    a = torch.ones(size, size, dtype=dtype)
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(a, a)
        taken.append(time.perf_counter() - began)
    return min(taken)
