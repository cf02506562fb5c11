"""One decoder layer on sets of rows: which rows enter a sublayer expresses what is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fastskip.decoder.attention import AttentionPattern
from fastskip.decoder.entries import Entries
from fastskip.decoder.positions import HeadRotation
from fastskip.decoder.weights import Products
from fastskip.ops import Operations
from fastskip.plan import LayerPlan
from fastskip.policy import Norm, Sublayer
from fastskip.tokens import Rows, replace

Add = Callable[[Tensor, Rows, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class BlockRows:
    """What enters each part of one layer; all index packed rows.

    Attributes:
        joint: rows whose q, k and v are projected together (they attend and hold an entry).
        stored: rows that only leave K and V.
        raw: rows that leave what the attention would have read, as K and V.
        reused: rows that copy their entry from a lower layer, by that layer.
        narrow: in the last layer, the only rows that continue after the K/V are written; ``None``
            elsewhere. The fields below index what is left.
        attending: rows that run attention; those not in ``joint`` project only q.
        replaced: rows whose residual stream is replaced by its attention norm.
        feeding: rows that run the FFN after the attention.
        beside: rows whose FFN reads what the attention reads.
        paired, alone: in a pair of layers: rows that read the same input in both, and rows that
            run one layer after the other; ``merged``: all paired rows, whether they continue or
            not.
        pattern: what the attending rows see; ``None`` without any.
        decide_feeding: where a router decides on the FFN alone: from the attention's output to the
            rows that run the FFN, instead of ``feeding``.
        factors: where a router is trained: by layer and sublayer, the factors ``[N]`` on the
            changes of all packed rows; complete once it has decided.
    """

    joint: Rows
    stored: Rows
    raw: Rows
    reused: tuple[tuple[int, Rows], ...]
    narrow: Rows | None
    attending: Rows
    replaced: Rows
    feeding: Rows
    beside: Rows
    paired: Rows
    alone: Rows
    merged: Rows
    pattern: AttentionPattern | None
    decide_feeding: Callable[[Tensor], Rows] | None = None
    factors: Mapping[tuple[int, Sublayer], Tensor] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no row does anything in the layer or leaves anything."""
        return self.pattern is None and not (
            self.joint.count
            or self.stored.count
            or self.raw.count
            or self.reused
            or self.attending.count
            or self.replaced.count
            or self.feeding.count
            or self.beside.count
            or self.decide_feeding
        )


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder layer as the runtime sees it: its projections, plan and attention parameters."""

    products: Products
    plan: LayerPlan
    ops: Operations
    scale: float
    dropout: float
    head_dim: int

    def run(
        self, h: Tensor, rows: BlockRows, rotation: HeadRotation, entries: Entries, add: Add
    ) -> Tensor:
        """The layer's cell of the semantics table: ``[N, D]`` in, ``[N, D]`` (or narrowed) out.

        Sequential: ``h1 = h + A(N1 h)``, ``out = h1 + F(N2 h1)``. Parallel: both read ``h``. Rows
        that skip a part, or run it in the other form, are not in its rows.
        """
        if rows.is_idle:
            return h if rows.narrow is None else rows.narrow.take(h)
        narrow = rows.narrow or _all(h)
        beside = self._ffn(narrow.take(h), rows.beside, self._beside_norm, rows)
        attention = self._attention(h, rows, rotation, entries)
        h = self._add(narrow.take(h), rows.attending, attention, add)
        if rows.replaced.count:
            h = replace(h, rows.replaced, self.products.attention_norm(rows.replaced.take(h)))
        feeding = rows.feeding if rows.decide_feeding is None else rows.decide_feeding(h)
        h = self._add(h, feeding, self._ffn(h, feeding, self.products.ffn_norm, rows), add)
        return self._add(h, rows.beside, beside, add)

    def change(
        self, h: Tensor, rows: BlockRows, rotation: HeadRotation, entries: Entries
    ) -> Tensor:
        """``d``: what the dense layer adds to each row of its (narrowed) input; zero for rows that
        do not attend. Both blocks of a pair compute it from the same ``h``."""
        attention = self._attention(h, rows, rotation, entries)
        h = (rows.narrow or _all(h)).take(h)
        if attention is None:  # no row continues: every one wanted is a pad
            return h.new_zeros(h.shape)
        change = attention + self.products.ffn(
            self.products.ffn_norm(rows.attending.take(h) + attention)
        )
        if rows.attending.count == len(h):
            return change
        return replace(h.new_zeros(h.shape), rows.attending, change)

    def _attention(
        self, h: Tensor, rows: BlockRows, rotation: HeadRotation, entries: Entries
    ) -> Tensor | None:
        """``A(N1 h)`` of the attending rows; stores the layer's new entries on the way."""
        products, layer = self.products, self.plan.index
        queries = None
        if rows.joint.count:
            heads, values = products.queries_keys_values(
                products.attention_norm(rows.joint.take(h))
            )
            heads = rotation.take(rows.joint).turn(heads)
            groups = values.shape[1]
            queries, keys = heads[:, :-groups], heads[:, -groups:]
            entries.append(layer, rows.joint, keys, values)
        if rows.stored.count:
            x = products.attention_norm(rows.stored.take(h))
            keys, values = products.keys_values(x)
            keys = rotation.take(rows.stored).turn(keys)
            entries.append(layer, rows.stored, keys, values)
        if rows.raw.count:
            x = products.attention_norm(rows.raw.take(h))
            values = x.view(len(x), -1, self.head_dim)
            entries.append(layer, rows.raw, rotation.take(rows.raw).turn(values), values)
        for source, copied in rows.reused:
            entries.reuse(layer, source, copied)
        if rows.pattern is None:
            return None
        if queries is None:
            queries = self._narrow_queries(h, rows, rotation)
        if entries.maps is not None:
            weights = rows.pattern.weights(queries, layer, entries, self.scale)
            entries.maps.note(layer, queries, weights, entries.columns)
        mixed = rows.pattern.attend(queries, layer, entries, self.ops, self.scale, self.dropout)
        change = products.attention_output(mixed)
        return self._scaled(change, Sublayer.ATTENTION, rows.attending, rows)

    def _narrow_queries(self, h: Tensor, rows: BlockRows, rotation: HeadRotation) -> Tensor:
        """Queries of the last layer, whose K and V were projected for more rows than continue."""
        narrow = rows.narrow or _all(h)
        x = self.products.attention_norm(rows.attending.take(narrow.take(h)))
        return rotation.take(narrow).take(rows.attending).turn(self.products.queries(x))

    def _beside_norm(self, h: Tensor) -> Tensor:
        """What the FFN of a parallel row reads: ``N2 h``, ``N1 h`` or ``N2 N1 h``."""
        if self.plan.norm is Norm.OWN:
            return self.products.ffn_norm(h)
        shared = self.products.attention_norm(h)
        return shared if self.plan.norm is Norm.SHARED else self.products.ffn_norm(shared)

    def _ffn(
        self, h: Tensor, feeding: Rows, norm: Callable[[Tensor], Tensor], rows: BlockRows
    ) -> Tensor | None:
        """``F(norm h)`` of the rows that run the FFN."""
        if not feeding.count:
            return None
        change = self.products.ffn(norm(feeding.take(h)))
        return self._scaled(change, Sublayer.FFN, feeding, rows)

    def _scaled(self, change: Tensor, sublayer: Sublayer, own: Rows, rows: BlockRows) -> Tensor:
        factors = None if rows.factors is None else rows.factors.get((self.plan.index, sublayer))
        if factors is None:
            return change
        return change * own.take((rows.narrow or _all(factors)).take(factors))[:, None]

    @staticmethod
    def _add(h: Tensor, rows: Rows, change: Tensor | None, add: Add) -> Tensor:
        return h if change is None else add(h, rows, change)


def _all(h: Tensor) -> Rows:
    return Rows(slice(0, h.shape[0]), h.shape[0])
