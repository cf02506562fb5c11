"""Attention weights of a forward, on request (Hugging Face's ``output_attentions``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastskip.tokens import TokenLayout


class AttentionMaps:
    """Attention weights, layer by layer; computed apart from the attention, without gradients.

    A layer's map is ``[B, H, T, C]`` in the queries' dtype, over all ``C`` columns so far: zero for
    rows that do not attend there, for pads, and for columns that have no entry.
    """

    def __init__(self, layout: TokenLayout, depth: int, heads: int) -> None:
        self._first, self._depth = layout.first_column, depth
        self._shape = layout.batch, heads, layout.width, layout.first_column + layout.width
        self._found: dict[int, Tensor] = {}

    @torch.no_grad()
    def note(
        self,
        layer: int,
        queries: Tensor,
        weights: Iterable[tuple[int, Tensor, Tensor]],
        columns_of: Callable[[int, int], Tensor],
    ) -> None:
        """Records a layer's map, from rotated ``queries [n, H, K]``.

        ``weights``: as ``AttentionPattern.weights`` yields them, here, so without gradients;
        ``columns_of``: from a layer and a sequence to the columns of its stored entries.
        """
        found = self._found[layer] = queries.new_zeros(self._shape)
        for sequence, reach, own in weights:
            columns = columns_of(layer, sequence)
            # The last entry that a row sees is its own.
            rows = columns[reach - 1] - self._first
            found[sequence][:, rows[:, None], columns[: own.shape[2]]] = own

    def all(self, like: Tensor) -> tuple[Tensor, ...]:
        """The maps of all layers; ``like``: dtype and device for layers in which no row attends."""
        blank = like.new_zeros(self._shape)
        return tuple(self._found.get(layer, blank) for layer in range(self._depth))
