"""Matrices with zeros for tests."""

import torch
from torch import Tensor


def with_zeros(rows: int, columns: int, share: float, *, seed: int = 0) -> Tensor:
    """fp64 values that bf16 holds exactly, of which about a share is zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator).bfloat16().double()
    return values.masked_fill(torch.rand(rows, columns, generator=generator) < share, 0)
