"""Conditions of graph nodes, set on the device by Triton; CUDA only."""

from __future__ import annotations

from torch import Tensor


def set_condition(runs: Tensor, handle: int) -> None:
    """Lets an IF node's body run if any of ``runs [n]`` is not 0; handle 0 means no node."""
    from fastskip.kernels.conditional import set_condition

    set_condition(runs, handle)
