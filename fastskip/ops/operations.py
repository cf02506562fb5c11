"""The interface of the fused operations: what the device executor is written against.

``ops.fused`` (torch) and ``ops.compiled`` (Triton, and torch's library GEMMs where those are
faster) implement it as modules; ``ops.fused``, ``ops.fused_entries`` and ``ops.fused_routes``
define what each function computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastskip.ops.contracts import (
    Bounds,
    Choice,
    Feed,
    HalfNorm,
    Linear,
    Norm,
    Pages,
    Projection,
    Reach,
    StepReach,
    Term,
)
from fastskip.ops.hops import Hops
from fastskip.ops.routes import Chosen, Route, Switch


class FusedOperations(Protocol):
    """One implementation; see ``ops.fused`` for shapes and meanings."""

    def normalize(
        self,
        h: Tensor,
        norm: Norm,
        *,
        index: Tensor | None = None,
        change: Tensor | None = None,
    ) -> Tensor: ...

    def project_append(
        self,
        h: Tensor,
        projections: Sequence[Projection],
        *,
        index: Tensor | None = None,
        chosen: Chosen | None = None,
        half: HalfNorm | None = None,
        arrivals: Tensor | None = None,
    ) -> list[Tensor]: ...

    def feed(
        self,
        h: Tensor,
        feeds: Sequence[Feed],
        *,
        index: Tensor | None = None,
        changes: Sequence[Tensor] | None = None,
        chosen: Chosen | None = None,
        arrivals: Tensor | None = None,
        half: HalfNorm | None = None,
    ) -> list[Tensor]: ...

    def project_append_feed(
        self,
        h: Tensor,
        projection: Projection,
        part: Feed,
        *,
        index: Tensor | None = None,
        chosen: tuple[Chosen | None, Chosen | None] = (None, None),
    ) -> tuple[Tensor, Tensor]: ...

    def add_terms_(
        self,
        h: Tensor,
        terms: Sequence[Term],
        *,
        index: Tensor | None = None,
        changes: Sequence[Tensor] = (),
        factor: float = 1.0,
        chosen: Sequence[Chosen | None] = (),
        then: Route | None = None,
        arrivals: Tensor | None = None,
    ) -> Tensor: ...

    def add_terms_and_halve_(
        self,
        h: Tensor,
        terms: Sequence[Term],
        norm: Norm,
        *,
        factor: float = 1.0,
        arrivals: Tensor | None = None,
    ) -> HalfNorm | None: ...

    def apply_terms(self, terms: Sequence[Term]) -> list[Tensor]: ...

    def attend_rows(self, queries: Tensor, reach: Reach, pages: Pages, scale: float) -> Tensor: ...

    def attend_step(
        self,
        queries: Sequence[Tensor],
        reach: Sequence[StepReach],
        pages: Sequence[Pages],
        scale: float,
    ) -> list[Tensor]: ...

    def copy_entries(
        self,
        source: Pages,
        target: Pages,
        sequences: Tensor,
        from_slots: Tensor,
        to_slots: Tensor,
        runs: Tensor | None = None,
    ) -> None: ...

    def read_entries(
        self, pages: Pages, sequences: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def head_logits(
        self, h: Tensor, norm: Norm | None, head: Linear, *, half: HalfNorm | None = None
    ) -> Tensor: ...

    def head_choose(
        self,
        h: Tensor,
        norm: Norm | None,
        head: Linear,
        choice: Choice,
        *,
        half: HalfNorm | None = None,
    ) -> None: ...

    def choose(self, logits: Tensor, choice: Choice) -> None: ...

    def advance(self, choice: Choice) -> None: ...

    def embed(
        self,
        tokens: Tensor,
        table: Tensor,
        out: Tensor,
        *,
        positions: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None: ...

    def compact(self, mask: Tensor) -> tuple[Tensor, Tensor]: ...

    def route(self, h: Tensor, taken: Route) -> None: ...

    def begin_hops(self, h: Tensor, hops: Hops, condition: int = 0) -> None: ...

    def hop(self, h: Tensor, hops: Hops, condition: int = 0) -> None: ...

    def choose_rows(self, runs: Tensor, switch: Switch | None = None) -> Chosen: ...

    def place_entries(
        self, held: Tensor, order: Tensor, bounds: Bounds, counts: Tensor
    ) -> tuple[Tensor, Tensor]: ...
