"""Record the scores of routers while they decide."""

from __future__ import annotations

from torch import Tensor

from fastskip.ops.fused_routes import agreed
from fastskip.ops.routes import Terms
from fastskip.routing import Router, RoutingContext, ScoreRouter

Scores = dict[tuple[int, int], list[Tensor]]
"""By router and layer: the scores of its candidate groups, one host tensor per forward."""


class Observer(ScoreRouter):
    """Wraps a router: decides exactly as it does, and records its scores."""

    def __init__(self, router: Router, number: int, found: Scores) -> None:
        assert isinstance(router, ScoreRouter)
        super().__init__(router.rule)
        self._router, self._number, self._found = router, number, found

    def terms(self, layer: int) -> Terms:
        return self._router.terms(layer)

    def scores(self, context: RoutingContext) -> Tensor:
        scores = self._router.scores(context)
        sequences, positions = (
            rows.to(scores.device) for rows in (context.sequences, context.positions)
        )
        own = agreed(scores, sequences, positions, self.terms(context.layer))
        self._found.setdefault((self._number, context.layer), []).append(own.cpu())
        return scores
