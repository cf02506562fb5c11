"""Features that are added to image rows after the first layers, besides those that replace their
placeholders (DeepStack, arXiv 2406.04334; Qwen3-VL has them).

They are added to a layer's output, whatever was skipped in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastskip.decoder.layer import Add
from fastskip.ops.allocate import to_device
from fastskip.tokens import Rows, TokenLayout


@dataclass(frozen=True, slots=True, eq=False)
class DeepFeatures:
    """The features of one forward.

    Attributes:
        of_layers: ``[n, D]`` for each of the first layers.
        flat: ``[n]`` (host) indices of their rows in the flattened ``[B * T]`` columns.
    """

    of_layers: Sequence[Tensor]
    flat: Tensor

    @classmethod
    def of(
        cls,
        mask: Tensor | None,
        of_layers: Sequence[Tensor] | None,
        *,
        placeholders: Tensor | None,
    ) -> DeepFeatures | None:
        """From what Hugging Face passes to a decoder: which columns get features, ``mask [B, T]``,
        and the features; ``None`` without them.

        ``placeholders [B, T]`` (host): where features may go; if there are as many as features,
        the mask is not read, which saves a host sync.
        """
        if not of_layers or mask is None:
            return None
        if placeholders is None or int(placeholders.sum()) != len(of_layers[0]):
            placeholders = mask.cpu()
        return cls(of_layers, placeholders.flatten().nonzero().squeeze(1))

    def among(self, layout: TokenLayout) -> PlacedFeatures:
        """The features of the rows that a layout has."""
        rows = layout.locate(self.flat).ids(self.flat.device)
        left = (rows >= 0).nonzero().squeeze(1)
        if len(left) == len(rows):
            return PlacedFeatures(dict(enumerate(self.of_layers)), rows)
        own = [features[to_device(left, features.device)] for features in self.of_layers]
        return PlacedFeatures(dict(enumerate(own)), rows[left])


@dataclass(frozen=True, slots=True, eq=False)
class PlacedFeatures:
    """The features of packed rows.

    Attributes:
        of_layers: ``[n, D]`` by layer.
        rows: ``[n]`` the rows that get them; on any device.
    """

    of_layers: Mapping[int, Tensor]
    rows: Tensor

    def enter(self, step: Sequence[int], h: Tensor, add: Add) -> Tensor:
        """``h [N, D]``, the output of a step's layers, with their features added."""
        for layer in step:
            own = self.of_layers.get(layer)
            if own is not None:
                h = add(h, Rows(self.rows, len(self.rows)), own.to(h.device, h.dtype))
        return h
