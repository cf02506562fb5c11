"""Gradient checkpointing: a layer's activations are dropped and computed again when gradients come.

transformers marks the layers to do so with (``gradient_checkpointing_enable``), and calls a layer
that is in training mode so; this does the same for blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastskip.decoder.entries import Entries, GradientEntries
from fastskip.decoder.layer import BlockRows
from fastskip.tokens import Rows

Run = Callable[..., Tensor]


def recomputes(layer: Any) -> bool:
    """Whether transformers' layer is marked, and in training."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def maybe_recomputed(run: Run, layer: Any, index: int, entries: Entries) -> Run:
    """``run(h, rows, ...)`` of a block as it is, or so that it runs again in the backward pass.

    Entries that a kept cache gets as well are written once, so such forwards keep activations.
    """
    is_light = isinstance(entries, GradientEntries) and not entries.is_kept and recomputes(layer)
    if not is_light:
        return run

    def again(h: Tensor, rows: BlockRows, *rest: Any) -> Tensor:
        assert isinstance(entries, GradientEntries)
        entries.forget(index)
        return run(h, rows, *rest)

    def light(h: Tensor, rows: BlockRows, *rest: Any) -> Tensor:
        if rows.decide_feeding is not None:
            rows = replace(rows, decide_feeding=_once(rows.decide_feeding))
        out: Tensor = checkpoint(again, h, rows, *rest, use_reentrant=False)
        return out

    return light


def _once(decide: Callable[[Tensor], Rows]) -> Callable[[Tensor], Rows]:
    """A router is asked once; what runs again does what was decided.

    What a router that is trained needs for its own gradient is therefore kept.
    """
    decided: list[Rows] = []

    def recalled(h: Tensor) -> Rows:
        if not decided:
            with saved_tensors_hooks(_kept, _kept):
                decided.append(decide(h))
        return decided[0]

    return recalled


def _kept(tensor: Tensor) -> Tensor:
    return tensor
