"""Gradient checkpointing: a layer's activations are dropped and recomputed in the backward pass.

transformers marks the layers to checkpoint (``gradient_checkpointing_enable``) and checkpoints
those that are in training mode; this does the same for blocks.
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
    """Whether a transformers layer is marked and in training mode."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def maybe_recomputed(run: Run, layer: Any, index: int, entries: Entries) -> Run:
    """A block's ``run(h, rows, ...)`` as it is, or so that it runs again in the backward pass.

    Entries of a cache that is kept are written only once, so such forwards keep activations.
    """
    is_kept = not isinstance(entries, GradientEntries) or entries.is_kept
    if is_kept or not recomputes(layer):
        return run

    def rerun(h: Tensor, rows: BlockRows, *rest: Any) -> Tensor:
        assert isinstance(entries, GradientEntries)
        entries.forget(index)
        return run(h, rows, *rest)

    def checkpointed(h: Tensor, rows: BlockRows, *rest: Any) -> Tensor:
        if rows.decide_feeding is not None:
            rows = replace(rows, decide_feeding=_once(rows.decide_feeding))
        out: Tensor = checkpoint(rerun, h, rows, *rest, use_reentrant=False)
        return out

    return checkpointed


def _once(decide: Callable[[Tensor], Rows]) -> Callable[[Tensor], Rows]:
    """Asks a router only once: the second run follows what was decided.

    What a trained router needs for its own gradient is therefore kept.
    """
    decided: list[Rows] = []

    def recalled(h: Tensor) -> Rows:
        if not decided:
            with saved_tensors_hooks(_unchanged, _unchanged):
                decided.append(decide(h))
        return decided[0]

    return recalled


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
