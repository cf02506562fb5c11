"""The operations of a decoder, and the choice of their implementation.

The reference operations are small, one call each. The fused ones (documented in ``ops.fused``) do
in one call what a decoder layer does between two points where rows interact; the device executor is
written against them, and Triton kernels implement them.

``resolve`` is called once, when a model is prepared; the decoder then holds the chosen
implementation and calls it without further decisions. Nothing is chosen silently: an explicit
choice that cannot run raises and lists what can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastskip.ops import attention, fused, products, reference
from fastskip.ops.contracts import Activation, Linear, Norm
from fastskip.ops.operations import FusedOperations


class Implementation(Enum):
    """Plain torch, or fused Triton kernels on CUDA.

    ``TORCH`` is the device executor on torch's own operations: slow, for debugging.
    """

    REFERENCE = "reference"
    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation's functions; shapes and meanings are those of ``ops.reference``,
    ``ops.attention`` and ``ops.products``.

    ``fused``: what the device executor runs on; ``None``: the plain executor runs instead.
    """

    implementation: Implementation
    normalize: Callable[[Tensor, Norm], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    feed_forward: Callable[[Tensor, Linear, Activation, Linear], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend: Callable[..., Tensor]
    fused: FusedOperations | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Modules cannot be copied: a copied model looks up its implementation by name.
        return operations_of, (self.implementation,)


REFERENCE = Operations(
    Implementation.REFERENCE,
    reference.normalize,
    products.linear,
    products.feed_forward,
    reference.rotate,
    attention.attend,
)


TORCH = replace(REFERENCE, implementation=Implementation.TORCH, fused=fused)


def resolve(impl: str | Implementation | None, device: torch.device) -> Operations:
    """The operations that ``impl`` names.

    Args:
        impl: ``None`` chooses by device (``"triton"`` on CUDA, ``"reference"`` elsewhere);
            ``"reference"`` and ``"torch"`` run anywhere.
        device: where the decoder's weights lie.
    Raises:
        ValueError: unknown name, or an implementation that cannot run on ``device``.
    """
    allowed = [choice.value for choice in Implementation]
    if impl is None:
        impl = Implementation.TRITON if device.type == "cuda" else Implementation.REFERENCE
    try:
        choice = Implementation(impl)
    except ValueError:
        raise ValueError(f"impl: {impl!r} is unknown; allowed: {allowed}") from None
    if choice is Implementation.TRITON:
        _require_triton(device)
    return operations_of(choice)


def operations_of(choice: Implementation) -> Operations:
    """The operations of an implementation, on any device; ``resolve`` checks that they run."""
    if choice is Implementation.TRITON:
        from fastskip.ops import compiled

        return replace(REFERENCE, implementation=choice, fused=compiled)
    return TORCH if choice is Implementation.TORCH else REFERENCE


def _require_triton(device: torch.device) -> None:
    """Raises unless Triton kernels can run on ``device``."""
    others = "allowed here: 'reference', 'torch'"
    if find_spec("triton") is None:
        raise ValueError(
            f"impl: 'triton' needs the triton package (pip install 'fastskip[gpu]'); {others}"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                f"impl: 'triton' needs compute capability 8.0 or higher, but {device} "
                f"has {major}.{minor}; {others}"
            )
        return
    from fastskip.kernels.numerics import INTERPRETED

    if not (device.type == "cpu" and INTERPRETED.value):
        raise ValueError(
            f"impl: 'triton' runs on CUDA, but the model is on {device} (on the CPU only in "
            f"Triton's interpreter, for testing: set TRITON_INTERPRET=1 before Python starts); "
            f"{others}"
        )
