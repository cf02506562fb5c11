"""How rows get their positions: by rotating queries and keys, or by adding to embeddings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastskip.decoder.anatomy import has_hooks
from fastskip.decoder.rope import RotaryTable
from fastskip.ops.contracts import Rotation
from fastskip.tokens import Rows, TokenLayout


class HeadRotation(Protocol):
    """The rotation of queries and keys, for all packed rows or some of them."""

    def take(self, rows: Rows) -> HeadRotation:
        """The rotation of these rows."""

    def turn(self, heads: Tensor) -> Tensor:
        """Rotates heads: ``[N, H, K] -> [N, H, K]``."""


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    """RoPE: tables ``[N, 1, K]``, as ``ops.rotate`` takes them."""

    cosine: Tensor
    sine: Tensor
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]

    def take(self, rows: Rows) -> RotaryEmbedding:
        return RotaryEmbedding(rows.take(self.cosine), rows.take(self.sine), self.rotate)

    def turn(self, heads: Tensor) -> Tensor:
        return self.rotate(heads, self.cosine, self.sine)


class NoTurns:
    """Heads stay as they are."""

    def take(self, rows: Rows) -> NoTurns:
        return self

    def turn(self, heads: Tensor) -> Tensor:
        return heads


class Positions(Protocol):
    """A decoder's positions.

    Attributes:
        counts_pads: whether a row's default position is its column.
        has_axes: whether rows may have separate positions in time, height and width.
        table: ``[positions, D]`` that decode steps add to embeddings; ``None``: nothing.
        is_plain: whether nothing but ``table`` is added.
        scale: what embeddings are multiplied by first (Granite).
    """

    counts_pads: bool
    scale: float

    @property
    def has_axes(self) -> bool: ...

    @property
    def table(self) -> Tensor | None: ...

    @property
    def is_plain(self) -> bool: ...

    def refresh(self) -> object:
        """Called before a forward, since what positions are made of may have changed. Returns the
        same object as long as it has not."""

    def embed(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The input of layer 0, from embeddings ``[N, D]`` at ``positions [N]`` (any device)."""

    def check(self, positions: Tensor) -> None:
        """Raises ``ValueError`` if one of ``positions [N]`` (host) does not exist."""

    def room(self, next_one: int) -> int:
        """How many positions there are from ``next_one`` on."""

    def turns(self, layout: TokenLayout, like: Tensor) -> HeadRotation:
        """The rotation of all rows, in the dtype and on the device of ``like``."""

    def rotation(self, needed: int, like: Tensor, axes: Tensor | None = None) -> Rotation | None:
        """Tables as kernels read them, of at least ``needed`` positions, or with one row for each
        of ``axes [3, N]`` (any device), all below ``needed``; ``None`` without RoPE."""


class RotaryPositions:
    """RoPE: nothing is added to embeddings; queries and keys are rotated."""

    counts_pads = True
    table = None
    is_plain = True

    def __init__(
        self,
        text_model: Callable[[], Any],
        rotate: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        # The model, not its rotary module, which users may replace.
        self._text_model, self._rotate = text_model, rotate
        self._tables = RotaryTable(text_model().rotary_emb)
        self.scale = _scale_of(text_model())

    @property
    def has_axes(self) -> bool:
        return self._tables.axis is not None

    def refresh(self) -> object:
        rotary, scale = self._text_model().rotary_emb, _scale_of(self._text_model())
        if not self._tables.is_of(rotary) or scale != self.scale:
            self._tables, self.scale = RotaryTable(rotary), scale
        return self._tables

    def embed(self, rows: Tensor, positions: Tensor) -> Tensor:
        return rows if self.scale == 1.0 else rows * self.scale

    def check(self, positions: Tensor) -> None:
        limit = self._tables.limit
        if bool((positions < 0).any()):
            raise ValueError(f"position_ids: {int(positions.min())}; allowed: 0 or more")
        if limit is None:
            return
        wrong = positions[positions >= limit]
        if len(wrong):
            raise ValueError(
                f"position_ids: {int(wrong[0])}; allowed: 0 to {limit - 1}, below "
                "max_position_embeddings: beyond it dynamic RoPE changes the angles of all rows"
            )

    def room(self, next_one: int) -> int:
        limit = self._tables.limit
        return sys.maxsize if limit is None else max(0, limit - next_one)

    def turns(self, layout: TokenLayout, like: Tensor) -> HeadRotation:
        if layout.axes is None:
            return RotaryEmbedding(*self._tables.at(layout.positions, like), self._rotate)
        angles = self._tables.at_axes(layout.axes, layout.positions_needed, like)
        return RotaryEmbedding(*angles, self._rotate)

    def rotation(self, needed: int, like: Tensor, axes: Tensor | None = None) -> Rotation | None:
        tables = self._tables
        if axes is None:
            return Rotation(*tables.halves(needed, like))
        return Rotation(*tables.halves_at(axes, needed, like))


class LearnedPositions:
    """A learned row per position is added to the embeddings, as in OPT; pads do not count."""

    counts_pads = False
    has_axes = False
    scale = 1.0

    def __init__(self, text_model: Callable[[], Any]) -> None:
        # The model, not its embedding, which users may replace.
        self._text_model = text_model

    @property
    def table(self) -> Tensor | None:
        embedding = self._text_model().embed_positions
        table: Tensor = embedding.weight.detach()[embedding.offset :]
        return table

    @property
    def is_plain(self) -> bool:
        embedding = self._text_model().embed_positions
        is_own = type(embedding).__name__ == "OPTLearnedPositionalEmbedding"
        return is_own and not has_hooks(embedding)

    def refresh(self) -> object:
        return None  # everything is looked up when it is used

    def embed(self, rows: Tensor, positions: Tensor) -> Tensor:
        at = positions.to(rows.device)
        # The mask would only serve to compute the positions, which are given.
        added: Tensor = self._text_model().embed_positions(None, position_ids=at)
        return rows + added

    def check(self, positions: Tensor) -> None:
        count = self.room(0)
        wrong = positions[(positions < 0) | (positions >= count)]
        if len(wrong):
            raise ValueError(
                f"position_ids: {int(wrong[0])}; allowed: 0 to {count - 1}, the positions that "
                "the model has learned (max_position_embeddings)"
            )

    def room(self, next_one: int) -> int:
        embedding = self._text_model().embed_positions
        return max(0, int(embedding.num_embeddings - embedding.offset) - next_one)

    def turns(self, layout: TokenLayout, like: Tensor) -> HeadRotation:
        return NoTurns()

    def rotation(self, needed: int, like: Tensor, axes: Tensor | None = None) -> Rotation | None:
        return None


def _scale_of(text_model: Any) -> float:
    return float(getattr(text_model, "embedding_multiplier", 1.0))


def positions_of(
    text_model: Callable[[], Any], rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Positions:
    """The positions of the decoder ``text_model()``; ``rotate``: rotates heads by tables."""
    if hasattr(text_model(), "embed_positions"):
        return LearnedPositions(text_model)
    return RotaryPositions(text_model, rotate)
