"""What the last layer did to each row: kept from layer to layer for routers that need it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskip.ops.fused_routes import measure
from fastskip.plan import SkipPlan
from fastskip.policy import TokenClass
from fastskip.routing import Router, ScoreRouter


def trace_start(
    plan: SkipPlan, routers: Sequence[Router], present: frozenset[TokenClass] | None = None
) -> int | None:
    """The first layer whose input the routers of a plan need; ``None`` if none looks back.

    ``present``: the classes that there are rows of; all, if not given.

    A similarity router looks at the last layer that a row ran whole, so the trace starts at the
    nearest lower layer in which it certainly does. A plug-in is assumed to look back unless it
    declares that it does not (``needs_trace = False``).
    """
    starts = []
    for cell in plan.routed:
        if present is not None and cell.token_class not in present:
            continue
        router = routers[cell.number]
        if not isinstance(router, ScoreRouter):
            if getattr(router, "needs_trace", True):
                return 0
        elif router.needs_trace:
            starts.append(certain_below(plan, cell.layer, cell.token_class))
    return min(starts, default=None)


def certain_below(plan: SkipPlan, layer: int, token_class: TokenClass) -> int:
    """The nearest layer below that rows of a class certainly run whole, else 0."""
    for below in reversed(plan.layers[:layer]):
        cell = below.cells[token_class]
        routed = plan.routed_by_layer.get(below.index, ())
        is_routed = any(other.token_class is token_class for other in routed)
        if (cell.attention or cell.ffn) and not is_routed:
            # A pair counts as one layer.
            return below.index if below.partner is None else min(below.index, below.partner)
    return 0


class RowTrace:
    """Cosine and relative change of the last layer that each of ``N`` rows ran whole.

    ``found [N, 2]``: ``-inf`` and ``+inf`` before the first.
    """

    def __init__(self, h: Tensor) -> None:
        """``h [N, D]``: the rows as they enter the first layer that counts."""
        wide = torch.promote_types(h.dtype, torch.float32)
        self.found = torch.tensor([[-math.inf, math.inf]], dtype=wide).repeat(len(h), 1)
        self.found = self.found.to(h.device)
        self._listed: list[list[float]] | None = None
        self._snapshot = h.detach().clone()

    @property
    def listed(self) -> list[list[float]]:
        """``found`` as plain numbers."""
        if self._listed is None:
            self._listed = self.found.tolist()
        return self._listed

    def move(self, h: Tensor, ran: NDArray[np.bool_]) -> None:
        """Moves on to the next layer: ``h`` is its input, and the output of the last one.

        ``ran [N]``: rows that ran it whole.
        """
        h = h.detach()
        if ran.any():
            found = measure(self._snapshot, h)
            if not ran.all():
                own = torch.from_numpy(ran).to(h.device)[:, None]
                found = torch.where(own, found, self.found)
            self.found, self._listed = found, None
        self._snapshot.copy_(h)
