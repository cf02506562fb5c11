"""What a router is asked and what it answers.

A router is called once a forward for every layer that a policy gives it, as soon as its candidates
stand before the first sublayer that it guards. It sees the candidates only: the rows of the
classes that its rule names and that no earlier router has sent past the layer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from fastskip.policy import Sublayer


class RouterError(ValueError):
    """A router that cannot be used, or an answer that cannot; names router, layer and what is."""


class Scope(Enum):
    """How far a decision reaches."""

    SUBLAYER = "sublayer"
    """What the rule names, in this layer."""
    REST = "rest"
    """What the rule names in this layer, and everything in all later ones: the row exits."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Which candidates skip: ``skip [n]`` bool, on any device; and how far that reaches.

    ``factor [n]``: while a router is trained, what the changes of its candidates are multiplied by,
    with its gradient.
    """

    skip: Tensor
    scope: Scope = Scope.SUBLAYER
    factor: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """How one row attended: ``weights [H, s]`` fp32 over the entries of ``columns [s]``.

    ``layer``: the nearest layer below in which the row attended.
    """

    layer: int
    columns: Tensor
    weights: Tensor


class RoutingContext(Protocol):
    """The candidates of one decision: ``n`` rows, sorted by nothing in particular.

    Tensors other than ``hidden`` and what is made of it lie on the host. Nothing may be written to
    but the two states.
    """

    @property
    def layer(self) -> int:
        """The layer that is about to run."""

    @property
    def skip(self) -> frozenset[Sublayer]:
        """What a row that skips leaves out."""

    @property
    def hidden(self) -> Tensor:
        """``[n, D]``: the residual stream as it enters the first sublayer in ``skip``."""

    @property
    def codes(self) -> Tensor:
        """``[n]``: token classes, 0 image, 1 text, 2 generated."""

    @property
    def sequences(self) -> Tensor:
        """``[n]``: which sequence of the batch each row belongs to."""

    @property
    def columns(self) -> Tensor:
        """``[n]``: the column of each row, those in the cache counted."""

    @property
    def positions(self) -> Tensor:
        """``[n]``: RoPE positions; unlike columns they do not count pads."""

    @property
    def last_layer(self) -> Tensor:
        """``[n, 2]``: cosine of input and output of the last layer that each row ran whole, and its
        relative change ``||out - in|| / ||in||``; ``-inf`` and ``+inf`` before the first."""

    @property
    def forward_state(self) -> MutableMapping[str, Any]:
        """What this router kept earlier in this forward."""

    @property
    def generation_state(self) -> MutableMapping[str, Any]:
        """What this router kept in any forward on this cache; without a cache, in this forward.

        Where a caller crops or reorders the cache (beams), its tensors stay as they are.
        """

    def logits(self, rows: Tensor | None = None, *, normed: bool = True) -> Tensor:
        """Logit lens: final norm (unless not ``normed``) and head on candidates ``rows [m]`` (all):
        ``[m, V]``."""

    def attention_of(self, row: int) -> AttentionWeights:
        """How a candidate attended in the nearest layer below; computed again for this call.

        Raises:
            RouterError: it has attended in no layer of this forward yet.
        """


class Router(Protocol):
    """Decides rows from data; one instance serves all layers of its rule."""

    def decide(self, context: RoutingContext) -> Decision:
        """Which candidates skip; called where there is at least one.

        Under gradients it is called on detached rows; a decision has none.
        """
