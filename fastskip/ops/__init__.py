"""The operations of a decoder, and the choice of who computes them.

``resolve`` is called once, when a model is prepared; the decoder then holds the chosen
implementation and calls it without further decisions. Nothing is chosen silently: an explicit
choice that cannot run raises and lists what can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fastskip.ops import reference


class Implementation(Enum):
    """Who computes: plain torch, or fused Triton kernels on CUDA."""

    REFERENCE = "reference"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation's functions; shapes and meanings are those of ``ops.reference``."""

    implementation: Implementation
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gated_silu: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend: Callable[..., Tensor]


REFERENCE = Operations(
    Implementation.REFERENCE,
    reference.rms_norm,
    reference.linear,
    reference.gated_silu,
    reference.rotate,
    reference.attend,
)


def resolve(impl: str | Implementation | None, device: torch.device) -> Operations:
    """The operations that ``impl`` names.

    Args:
        impl: ``None`` chooses by device; ``"reference"`` runs anywhere.
        device: where the decoder's weights lie.
    Raises:
        ValueError: unknown name, or an implementation that cannot run on ``device``.
    """
    allowed = [choice.value for choice in Implementation]
    try:
        choice = Implementation.REFERENCE if impl is None else Implementation(impl)
    except ValueError:
        raise ValueError(f"impl: {impl!r} is unknown; allowed: {allowed}") from None
    if choice is Implementation.TRITON:
        raise ValueError(
            f"impl: 'triton' is not available yet (device {device}); what can run: ['reference']"
        )
    return REFERENCE
