"""The router protocol: what a router receives and what it returns.

A router is called once per forward for every layer that its rule names, when its candidates reach
the first sublayer that it guards. It sees only the candidates: rows of the classes that its rule
names, without those that an earlier router made exit.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from fastskip.policy import Sublayer


class RouterError(ValueError):
    """An unusable router or decision; names the router, the layer and what is allowed."""


class Scope(Enum):
    """How far a decision reaches."""

    SUBLAYER = "sublayer"
    """The sublayers that the rule names, in this layer."""
    REST = "rest"
    """The sublayers that the rule names in this layer, and all later layers: the row exits."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Which candidates skip, ``skip [n]`` bool on any device, and how far the decision reaches.

    ``factor [n]``: in router training, a differentiable factor on the candidates' sublayer outputs;
    to later routers that ask for ``last_layer``, a row with the factor 0 did not run this layer.
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
    """The candidates of one decision: ``n`` rows in no particular order.

    All tensors except ``hidden`` and those computed from it are on the host. Everything except the
    two states is read-only. ``hidden`` may be a view of the residual stream: a router that changes
    it in place is refused (in inference mode, where torch does not count changes, it would change
    what the model computes), and one that keeps it must clone it. The other tensors are copies.
    """

    @property
    def layer(self) -> int:
        """The index of the layer that is about to run."""

    @property
    def skip(self) -> frozenset[Sublayer]:
        """The sublayers that a skipping row skips."""

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
        """``[n]``: the column of each row, counted from the start of the cache."""

    @property
    def positions(self) -> Tensor:
        """``[n]``: RoPE positions; unlike columns, they do not count padding."""

    @property
    def last_layer(self) -> Tensor:
        """``[n, 2]``: for the last layer that each row ran in full, the cosine of input and output
        and the relative change ``||out - in|| / ||in||``; ``-inf`` and ``+inf`` if there is none.

        Raises:
            RouterError: the router has ``needs_trace = False``, so nothing was measured for it.
        """

    @property
    def forward_state(self) -> MutableMapping[str, Any]:
        """State that this router keeps within this forward."""

    @property
    def generation_state(self) -> MutableMapping[str, Any]:
        """State that this router keeps across forwards on this cache; without a cache, within this
        forward.

        Its tensors are not changed when a caller crops or reorders the cache (beam search).
        """

    def logits(self, rows: Tensor | None = None, *, normed: bool = True) -> Tensor:
        """Logit lens ``[m, V]``: the final norm (if ``normed``) and the head, applied to candidates
        ``rows [m]``, by default all."""

    def attention_of(self, row: int) -> AttentionWeights:
        """A candidate's attention weights in the nearest lower layer, recomputed on each call.

        Raises:
            RouterError: it has not attended in any layer of this forward yet.
        """


class Router(Protocol):
    """Decides from data which rows skip; one instance serves all layers of its rule."""

    def decide(self, context: RoutingContext) -> Decision:
        """Which candidates skip; called only with at least one candidate.

        With gradients enabled, candidates are detached, since a decision has no gradient.
        """
