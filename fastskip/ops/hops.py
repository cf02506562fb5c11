"""Hops: a decode step jumps from layer to layer, and the device decides which one is next.

A row that skips a layer leaves it unchanged, so a decision on one layer can be followed at once by
those on later layers, up to the first that any row runs. A step is then a loop over the layers that
run: the same launches for each, which locate its weights and entries by distances in device memory.
Layers that no row runs cost no launch at all.

``now`` holds the distances of the next layer: element offsets from the first layer's tensors
(``Field``). Letters as in ``ops.contracts``; ``L`` layers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from fastskip.ops.contracts import (
    Feed,
    Linear,
    Pages,
    Projection,
    StepReach,
    elements_between,
)
from fastskip.ops.routes import Move, Route, Score, Terms, Trace, signed

ALIGNMENT = 16
"""Distances of tensors that kernels read in wide loads are multiples of this many bytes."""


class Field(IntEnum):
    """What a distance leads to; ``LAYER`` holds the layer's number. The field after a weight is its
    bias."""

    LAYER = 0
    ATTENTION_GAIN = 1
    ATTENTION_SHIFT = 2
    QKV = 3
    QKV_BIAS = 4
    TABLE = 5
    OFFSET = 6
    COUNTS = 7
    OUTPUT = 8
    OUTPUT_BIAS = 9
    FFN_GAIN = 10
    FFN_SHIFT = 11
    FEED = 12
    FEED_BIAS = 13
    DOWN = 14
    DOWN_BIAS = 15


_NARROW = (Field.LAYER, Field.TABLE, Field.COUNTS)
"""Fields read element by element."""


@dataclass(frozen=True, slots=True)
class HopLayer:
    """A sequential layer that one row from each of ``n`` sequences may enter.

    Attributes:
        projection: queries, keys and values; with pages, without head norms.
        reach: what rows attend to; its counts are also the slots of the new entries.
        output, feed, down: the other products.
        terms: what decides which rows run it, never by capacity; ``None``: every live row does.
        home: ``[n]`` int32, where those flags are kept; for layers with ``terms``.
    """

    projection: Projection
    reach: StepReach
    output: Linear
    feed: Feed
    down: Linear
    terms: Terms | None = None
    home: Tensor | None = None

    @property
    def pages(self) -> Pages:
        assert self.projection.pages is not None
        return self.projection.pages

    def kind(self) -> Hashable:
        """What all layers of a loop must have in common."""
        own, pages = self.projection, self.pages
        norms = [(n.epsilon, n.is_centred, n.bias is None) for n in (own.norm, self.feed.norm)]
        linears = (own.linear, self.output, self.feed.linear, self.down)
        sizes = [(each.weight.shape, each.weight.stride(), each.bias is None) for each in linears]
        entries = id(pages.anchor), pages.groups, pages.head_dim, pages.table.stride()
        return tuple(norms), tuple(sizes), entries, own.head_dim, self.feed.activation

    def tensors(self) -> dict[Field, Tensor | None]:
        """The tensors that distances are measured between."""
        own, feed = self.projection, self.feed
        return {
            Field.ATTENTION_GAIN: own.norm.weight,
            Field.ATTENTION_SHIFT: own.norm.bias,
            Field.QKV: own.linear.weight,
            Field.QKV_BIAS: own.linear.bias,
            Field.TABLE: self.pages.table,
            Field.COUNTS: self.reach.counts,
            Field.OUTPUT: self.output.weight,
            Field.OUTPUT_BIAS: self.output.bias,
            Field.FFN_GAIN: feed.norm.weight,
            Field.FFN_SHIFT: feed.norm.bias,
            Field.FEED: feed.linear.weight,
            Field.FEED_BIAS: feed.linear.bias,
            Field.DOWN: self.down.weight,
            Field.DOWN_BIAS: self.down.bias,
        }


@dataclass(frozen=True, slots=True)
class HopDecisions:
    """The parts of decisions that differ between ``L`` layers.

    ``bars``, ``biases [L]`` fp32, ``salts [L]`` int32, ``weights [L, D]`` fp32 for ``LINEAR``: as
    in ``Terms``. A layer that every row runs has an infinite bar. ``homes [L]`` int64: elements
    from ``Hops.runs`` to where the layer's flags are kept.
    """

    bars: Tensor
    biases: Tensor
    salts: Tensor
    weights: Tensor | None
    homes: Tensor

    @classmethod
    def of(cls, layers: Sequence[HopLayer], runs: Tensor) -> HopDecisions:
        """Those of ``layers``; ``runs``: where homes are measured from."""
        terms = [layer.terms or ALWAYS for layer in layers]
        device, weights = runs.device, None
        known = [own.weight for own in terms if own.weight is not None]
        if known:
            none = torch.zeros_like(known[0])
            weights = torch.stack([none if own.weight is None else own.weight for own in terms])
        homes = [elements_between(runs, runs if own.home is None else own.home) for own in layers]
        return cls(
            torch.tensor([own.bar for own in terms], dtype=torch.float32, device=device),
            torch.tensor([own.bias for own in terms], dtype=torch.float32, device=device),
            torch.tensor([signed(own.salt) for own in terms], dtype=torch.int32, device=device),
            weights,
            torch.tensor(homes, dtype=torch.int64, device=device),
        )


ALWAYS = Terms(score=Score.RANDOM, bar=math.inf)
"""Every row runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """The layers of a loop, and its state. The loop does not decide on the first layer: its
    ``home`` holds the flags before the loop begins.

    Attributes:
        live: ``[n]``: 1 for rows that exist; others run nothing.
        positions, sequences: ``[n]``.
        trace: for ``COSINE`` and ``CHANGE``; updated after every layer that ran.
        arrivals: int32 scratch of at least 1 zero, which a launch leaves zero.
        scale: of attention scores.
        runs: ``[n]``: which rows run the next layer; all 0 after the last one.
        now: ``[Field]`` int64: the next layer's distances.
        table: ``[L, Field]`` int64: the distances of all layers.
        decisions: what differs between those on the layers.
    """

    layers: Sequence[HopLayer]
    live: Tensor
    positions: Tensor
    sequences: Tensor
    trace: Trace | None
    arrivals: Tensor
    scale: float
    runs: Tensor
    now: Tensor
    table: Tensor
    decisions: HopDecisions

    @property
    def terms(self) -> Terms:
        """What all decisions have in common: score, group and agreement are those of the first."""
        terms = self.layers[0].terms
        assert terms is not None
        return terms

    @property
    def route(self) -> Route:
        """How the trace is updated when a layer ends."""
        move = Move.NONE if self.trace is None else Move.NEXT
        ran = [self.runs] if self.trace is not None else []
        return Route(
            [], self.positions, self.sequences, self.trace, move, ran, arrivals=self.arrivals
        )

    @classmethod
    def over(
        cls,
        layers: Sequence[HopLayer],
        *,
        live: Tensor,
        positions: Tensor,
        sequences: Tensor,
        trace: Trace | None,
        arrivals: Tensor,
        scale: float,
    ) -> Hops:
        """A loop over ``layers``, for which ``can_hop`` holds."""
        runs = torch.zeros_like(live)
        rows = [_distances(number, own, layers[0]) for number, own in enumerate(layers)]
        table = torch.tensor(rows, dtype=torch.int64, device=live.device)
        return cls(
            layers=tuple(layers),
            live=live,
            positions=positions,
            sequences=sequences,
            trace=trace,
            arrivals=arrivals,
            scale=scale,
            runs=runs,
            now=table[0].clone(),
            table=table,
            decisions=HopDecisions.of(layers, runs),
        )


def can_hop(layers: Sequence[HopLayer]) -> bool:
    """Whether one loop serves ``layers``: they are of one kind, with one kind of decision, the
    first has one, by a bar, and distances between them keep wide loads aligned."""
    shared = {
        (own.score, own.group, own.agreement, own.capacity)
        for own in (layer.terms for layer in layers)
        if own is not None
    }
    is_alike = len({layer.kind() for layer in layers}) == len(shared) == 1
    if not is_alike or layers[0].terms is None or layers[0].terms.capacity is not None:
        return False
    size = layers[0].output.weight.element_size()
    wide = [each for each in Field if each not in _NARROW]
    return all(
        row[each] * size % ALIGNMENT == 0
        for row in (_distances(0, layer, layers[0]) for layer in layers)
        for each in wide
    )


def _distances(number: int, layer: HopLayer, first: HopLayer) -> list[int]:
    """The layer's row of the table."""
    found = [0] * len(Field)
    origin = first.tensors()
    for each, tensor in layer.tensors().items():
        start = origin[each]
        if tensor is not None and start is not None:
            found[each] = elements_between(start, tensor)
    found[Field.LAYER] = number
    found[Field.OFFSET] = layer.pages.offset - first.pages.offset
    return found
