"""The operations of a decoder, and the choice of who computes them.

``resolve`` is called once, when a model is prepared; the decoder then holds the chosen
implementation and calls it without further decisions. Nothing is chosen silently: an explicit
choice that cannot run raises and lists what can.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, cast

import torch
from torch import Tensor

from fastskip.ops import reference


class Implementation(Enum):
    """Who computes: plain torch, or fused Triton kernels on CUDA."""

    REFERENCE = "reference"
    TRITON = "triton"


class Operations(Protocol):
    """What an implementation provides; shapes and meanings are those of ``ops.reference``."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def gated_silu(self, gate_up: Tensor) -> Tensor: ...

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor: ...

    def attend(
        self,
        queries: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        visible: Tensor | None,
        *,
        is_causal: bool,
        scale: float,
        dropout: float = 0.0,
    ) -> Tensor: ...


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
    return cast(Operations, reference)
