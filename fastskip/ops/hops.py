"""Hops: a decode step goes from layer to layer, and the device says which one is next.

A row that skips a layer leaves it as it came, so whoever decides on a layer can decide on the ones
behind it as well, up to the first that any row runs. A step is then a loop over the layers that
run: the same launches for each, which find the weights and entries of theirs by distances in device
memory. What nobody runs has no launch at all.

``now`` holds the distances of the layer that is next, in elements, from the tensors of the first
one (``Field``). Letters as in ``ops.contracts``; ``L`` layers.
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
"""Bytes that every distance of what kernels read in wide loads is a multiple of."""


class Field(IntEnum):
    """What a distance leads to, ``LAYER``: the number among the layers. What belongs to a weight,
    its bias, is the next one."""

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
"""Read element by element."""


@dataclass(frozen=True, slots=True)
class HopLayer:
    """A sequential layer, and what one row of each of ``n`` sequences enters.

    Attributes:
        projection: of queries, keys and values; with pages, without norms of heads.
        reach: what rows see; its counts are also the slots of the new entries.
        output, feed, down: the other products.
        terms: how it is decided who runs it, not by capacity; ``None``: every live row does.
        home: ``[n]`` int32, where who runs it is kept; of layers with ``terms``.
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
        """What the layers of a loop have in common."""
        own, pages = self.projection, self.pages
        norms = [(n.epsilon, n.is_centred, n.bias is None) for n in (own.norm, self.feed.norm)]
        linears = (own.linear, self.output, self.feed.linear, self.down)
        sizes = [(each.weight.shape, each.weight.stride(), each.bias is None) for each in linears]
        entries = id(pages.anchor), pages.groups, pages.head_dim, pages.table.stride()
        return tuple(norms), tuple(sizes), entries, own.head_dim, self.feed.activation

    def tensors(self) -> dict[Field, Tensor | None]:
        """What distances are counted between."""
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
class Bars:
    """What decides on each of ``L`` layers, where their decisions differ.

    ``bars``, ``biases [L]`` fp32, ``salts [L]`` int32, ``weights [L, D]`` fp32 of ``LINEAR``: as in
    ``Terms``. A layer that every row runs has an infinite bar. ``homes [L]`` int64: elements from
    ``Hops.runs`` to where the layer's flags are kept.
    """

    bars: Tensor
    biases: Tensor
    salts: Tensor
    weights: Tensor | None
    homes: Tensor

    @classmethod
    def of(cls, layers: Sequence[HopLayer], runs: Tensor) -> Bars:
        """Those of ``layers``; ``runs``: where homes are counted from."""
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
    """The layers of a loop, and where it stands. Nobody decides on the first layer here: its
    ``home`` says who runs it before the loop begins.

    Attributes:
        live: ``[n]``: 1 for rows that there are; others run nothing.
        positions, sequences: ``[n]``.
        trace: of ``COSINE`` and ``CHANGE``; it moves on with every layer that was run.
        arrivals: int32 scratch of at least 1 zero, which a launch leaves zero.
        scale: of the attention.
        terms: of the first layer; all decisions have score, group and agreement in common.
        runs: ``[n]``: who runs the layer that is next; all 0 behind the last one.
        now: ``[Field]`` int64: its distances.
        table: ``[L, Field]`` int64: those of all layers.
        bars: what decides on each.
    """

    layers: Sequence[HopLayer]
    live: Tensor
    positions: Tensor
    sequences: Tensor
    trace: Trace | None
    arrivals: Tensor
    scale: float
    terms: Terms
    runs: Tensor
    now: Tensor
    table: Tensor
    bars: Bars

    @property
    def route(self) -> Route:
        """What becomes of the trace as a layer ends."""
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
        """A loop over ``layers``, which ``can_hop``."""
        first, runs = layers[0], torch.zeros_like(live)
        assert first.terms is not None
        rows = [_distances(number, own, first) for number, own in enumerate(layers)]
        table = torch.tensor(rows, dtype=torch.int64, device=live.device)
        return cls(
            layers=tuple(layers),
            live=live,
            positions=positions,
            sequences=sequences,
            trace=trace,
            arrivals=arrivals,
            scale=scale,
            terms=first.terms,
            runs=runs,
            now=table[0].clone(),
            table=table,
            bars=Bars.of(layers, runs),
        )


def can_hop(layers: Sequence[HopLayer]) -> bool:
    """Whether one loop serves ``layers``: they are of one kind, decided on in one way, the first of
    them by a bar, and distances between them keep wide loads whole."""
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
    """A row of the table."""
    found = [0] * len(Field)
    origin = first.tensors()
    for each, tensor in layer.tensors().items():
        start = origin[each]
        if tensor is not None and start is not None:
            found[each] = elements_between(start, tensor)
    found[Field.LAYER] = number
    found[Field.OFFSET] = layer.pages.offset - first.pages.offset
    return found
