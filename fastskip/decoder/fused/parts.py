"""What the layers of the device executor work on: which rows, and where their entries lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastskip.ops.contracts import (
    Bounds,
    HalfNorm,
    Norm,
    Pages,
    Reach,
    Rotation,
    StepReach,
    Targets,
)
from fastskip.ops.routes import Route


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of ``[N, D]``: a span or, where ``index`` is given, any rows."""

    span: slice
    count: int
    index: Tensor | None = None

    def view(self, h: Tensor) -> Tensor:
        return h if self.index is not None or self.is_all_of(h) else h[self.span]

    def take(self, h: Tensor) -> Tensor:
        """The rows, as a copy."""
        return h[self.span].clone() if self.index is None else h[self.index.long()]

    def put(self, h: Tensor, rows: Tensor) -> None:
        """Writes the rows back."""
        if self.index is None:
            h[self.span] = rows
        else:
            h[self.index.long()] = rows

    def is_all_of(self, h: Tensor) -> bool:
        return self.index is None and self.count == len(h)

    def is_same(self, other: Selection) -> bool:
        return self is other or (
            self.index is None and other.index is None and self.span == other.span
        )


NO_ROWS = Selection(slice(0, 0), 0)
# The targets of no rows are never read, so it does not matter that they lie on the host.
NO_TARGETS = Targets(*[torch.empty(0, dtype=torch.int32)] * 3)


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream ``h [N, D]``, and ``half`` of the norm that reads all of it next, where
    the last update computed that."""

    h: Tensor
    half: HalfNorm | None = None

    def half_of(self, norm: Norm | None, rows: Selection | None = None) -> HalfNorm | None:
        """The half of ``norm`` for some rows, or for all; ``None`` if it is not available."""
        half, is_of_all = self.half, rows is None or rows.is_all_of(self.h)
        return half if half is not None and half.norm is norm and is_of_all else None


@dataclass(frozen=True, slots=True)
class Copies:
    """Entries that a layer copies from a lower one: ``[n]`` sequences and slots.

    ``runs [n]``: rows with 1, as decided on the device, compute their own entries instead.
    """

    source: int
    sequences: Tensor
    from_slots: Tensor
    to_slots: Tensor
    runs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Placing:
    """How a hollow layer finds the slots of a prompt's rows.

    ``stored [N]``: rows that leave an entry without attending, ``None`` if there are none; the
    others as in ``ops.fused_routes.place_entries``. ``note`` gets the rows that hold one, ``[N]``.
    """

    stored: Tensor | None
    order: Tensor
    bounds: Bounds
    counts: Tensor
    note: Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class GuardedAttention:
    """What enters an attention whose rows are chosen on the device.

    Attributes:
        runs: ``[N]`` flags of the rows that attend.
        targets: positions and slots of all ``N`` rows, -1 for no entry; with ``placing``, slots
            are determined only once the flags are known.
        leaves_all: whether rows that do not attend may leave projected entries.
        reach: what the rows see; where rows are narrowed, of those that continue.
        copies: entries of rows that do not attend, copied from lower layers.
        placing: for a hollow layer, in a prompt.
    """

    runs: Tensor
    targets: Targets
    leaves_all: bool
    reach: Reach | StepReach
    copies: tuple[Copies, ...] = ()
    placing: Placing | None = None


@dataclass(frozen=True, slots=True)
class GuardedFeed:
    """What enters an FFN whose rows are chosen on the device: ``runs [N]`` flags, and the
    decisions right before it."""

    runs: Tensor
    between: Route | None = None


@dataclass(frozen=True, slots=True)
class FusedRows:
    """What enters each part of one layer; see ``decoder.layer.BlockRows``.

    ``joint_targets``, ``stored_targets``: where entries go; ``query_targets``: positions of queries
    that are projected alone (the last layer's). ``reach``: what the attending rows see; ``None``
    without any.

    Decisions: ``before`` is made before the layer, ``then_attention`` and ``then_ffn`` ride in its
    updates. A guarded sublayer uses ``attention`` or ``ffn`` instead of the fields above.

    ``arrivals``: scratch of GEMMs, as in ``ops.fused.feed``.
    """

    joint: Selection = NO_ROWS
    joint_targets: Targets = NO_TARGETS
    stored: Selection = NO_ROWS
    stored_targets: Targets = NO_TARGETS
    copies: tuple[Copies, ...] = ()
    narrow: Selection | None = None
    attending: Selection = NO_ROWS
    query_targets: Targets = NO_TARGETS
    feeding: Selection = NO_ROWS
    reach: Reach | StepReach | None = None
    before: Route | None = None
    then_attention: Route | None = None
    then_ffn: Route | None = None
    attention: GuardedAttention | None = None
    ffn: GuardedFeed | None = None
    arrivals: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Store:
    """What all layers of a forward share: RoPE tables, and where each layer's entries lie."""

    rotation: Rotation | None
    pages: Callable[[int], Pages]
