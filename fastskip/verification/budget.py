"""How wrong may a result be? As wrong as plain low-precision code, times a small factor.

The allowance is measured, not chosen: the truth is computed in a higher precision, the plain eager
computation in the precision under test shows what rounding does to this very input, and the result
may err by a small multiple of that. A band of a few units in the last place keeps the allowance
from vanishing where the eager error happens to be zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLE = 3.0
BAND = 4.0
"""In units in the last place of the truth's largest magnitude."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Largest absolute errors of one tensor, and where that of the tested result lies."""

    name: str
    error: float
    eager_error: float
    allowed: float
    worst: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """False also if the error is NaN, or the eager error is NaN or infinite."""
        return self.error <= self.allowed < math.inf

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3e} at {list(self.worst)}, "
            f"plain eager {self.eager_error:.3e}, allowed {self.allowed:.3e}"
        )


def measure(name: str, actual: Tensor, eager: Tensor, truth: Tensor) -> Budget:
    """Compare `actual` and `eager`, of one dtype, with `truth`, all of one shape."""
    if not actual.shape == eager.shape == truth.shape:
        shapes = [tuple(x.shape) for x in (actual, eager, truth)]
        raise ValueError(f"{name}: shapes of result, eager and truth differ: {shapes}")
    if truth.numel() == 0:
        raise ValueError(f"{name}: nothing to compare, the shape is {tuple(truth.shape)}")
    if actual.dtype != eager.dtype:
        raise ValueError(f"{name}: the result is {actual.dtype}, eager is {eager.dtype}")
    truth = truth.detach().double().cpu()
    error = (actual.detach().double().cpu() - truth).abs()
    # NaN counts as infinitely wrong, so that it is the worst.
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    eager_error = float((eager.detach().double().cpu() - truth).abs().max())
    band = BAND * torch.finfo(actual.dtype).eps * float(truth.abs().max())
    worst = torch.unravel_index(error.argmax(), error.shape)
    return Budget(
        name=name,
        error=float(error.max()),
        eager_error=eager_error,
        allowed=MULTIPLE * eager_error + band,
        worst=tuple(int(i) for i in worst),
    )
