"""What a router sees of the rows that it decides on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.attention import IMAGE
from fastskip.decoder.entries import Entries
from fastskip.decoder.guards import Ruling
from fastskip.decoder.layer import Block
from fastskip.decoder.positions import HeadRotation
from fastskip.decoder.removing import attention_weights
from fastskip.decoder.trace import RowTrace
from fastskip.routing import AttentionWeights, RouterError
from fastskip.tokens import Rows, TokenLayout

Lens = Callable[[Tensor, bool], Tensor]
"""From rows of the residual stream to logits, ``[m, D] -> [m, V]``; the flag: by the final norm."""


@dataclass(frozen=True, slots=True)
class Attended:
    """Where rows of a forward have attended so far.

    ``inputs``: by layer, its input ``[N, D]`` and which rows attended, ``[N]`` bool.
    """

    blocks: Sequence[Block]
    rotation: HeadRotation
    entries: Entries
    inputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Candidates:
    """The ``RoutingContext`` of one decision.

    ``rows``: the candidates among the ``N`` packed rows; ``within``: the candidates among the rows
    of ``h``, of which there are fewer after narrowing.
    """

    def __init__(
        self,
        ruling: Ruling,
        h: Tensor,
        within: Rows,
        rows: Tensor,
        *,
        layout: TokenLayout,
        trace: RowTrace | None,
        states: tuple[dict[str, Any], dict[str, Any]],
        lens: Lens | None,
        attended: Attended | None,
    ) -> None:
        """``states``: what the router keeps for this forward, and for this ``generate``."""
        self.layer, self.skip = ruling.layer, ruling.skip
        self.forward_state, self.generation_state = states
        self._h, self._within, self._rows, self._layout = h, within, rows, layout
        self._trace, self._lens, self._attended = trace, lens, attended

    @cached_property
    def hidden(self) -> Tensor:
        hidden = self._within.take(self._h.detach())
        self._first_version = _version(hidden)
        return hidden

    @property
    def is_changed(self) -> bool:
        """Whether ``hidden``, which may be a view of the residual stream, was changed in place."""
        return "hidden" in self.__dict__ and _version(self.hidden) != self._first_version

    @cached_property
    def codes(self) -> Tensor:
        return self._layout.codes[self._rows]

    @cached_property
    def sequences(self) -> Tensor:
        return self._layout.sequences[self._rows]

    @cached_property
    def columns(self) -> Tensor:
        return self._layout.columns[self._rows]

    @cached_property
    def positions(self) -> Tensor:
        return self._layout.positions[self._rows]

    @cached_property
    def last_layer(self) -> Tensor:
        if self._trace is None:
            raise RouterError(
                f"layer {self.layer}: last_layer needs a router with needs_trace = True, which is "
                "also assumed of routers that do not say"
            )
        return self._trace.found[self._rows.to(self._h.device)]

    @torch.no_grad()
    def logits(self, rows: Tensor | None = None, *, normed: bool = True) -> Tensor:
        hidden = self.hidden if rows is None else self.hidden[rows.to(self._h.device)]
        if self._lens is None:
            raise RouterError(
                f"layer {self.layer}: a router needs logits, but the model has no lm_head; "
                "allowed: models prepared with their lm_head"
            )
        return self._lens(hidden, normed)

    @torch.no_grad()
    def attention_of(self, row: int) -> AttentionWeights:
        if self._attended is None:
            raise RouterError(
                f"layer {self.layer}: attention_of needs a router with uses_attention = True"
            )
        packed = int(self._rows[row])
        for layer, (inputs, attending) in reversed(self._attended.inputs.items()):
            if bool(attending[packed]):
                return self._weights(layer, inputs[packed : packed + 1], packed)
        raise RouterError(
            f"layer {self.layer}: candidate {row} has not attended in any layer of this forward yet"
        )

    def _weights(self, layer: int, h: Tensor, packed: int) -> AttentionWeights:
        seen = self._attended
        assert seen is not None
        block, sequence = seen.blocks[layer], int(self._layout.sequences[packed])
        at = seen.rotation.take(Rows(slice(packed, packed + 1), 1))
        columns = seen.entries.columns(layer, sequence)
        columns = columns[columns <= self._layout.columns[packed]]
        key = seen.entries.keys(layer, sequence, len(columns))
        if block.plan.unimodal:
            codes = seen.entries.codes(layer, sequence)[: len(columns)]
            alike = (codes == IMAGE) == (self._layout.codes[packed] == IMAGE)
            columns, key = columns[alike], key[:, alike.to(key.device)]
        return AttentionWeights(layer, columns, attention_weights(block, h, at, key))


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version
