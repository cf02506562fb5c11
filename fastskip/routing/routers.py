"""The built-in routers: each row has a score and skips if it reaches a bar.

Scores and group decisions are defined and computed in one place for all implementations:
``ops.routes`` and ``ops.fused_routes``. If a score is within rounding of its bar, implementations
may decide differently; each executes what it decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastskip.ops import routes
from fastskip.ops.fused_routes import rounded, score, settle
from fastskip.ops.routes import Score, Terms, draw_one, mixed
from fastskip.policy import Measure, RouterRule, Sublayer
from fastskip.routing.protocol import Decision, RouterError, RoutingContext
from fastskip.routing.weights import LayerScore

MARGIN = 2.0**-51
"""Relative tolerance: more than rounding adds to a decimal, less than any written digit matters."""


def as_decimal(capacity: float) -> float:
    """A share for which ``ceil(share * m)`` equals that of the written decimal.

    0.56 of 50 rows is 28, but the float nearest to 0.56 is slightly larger, and so is the product.
    """
    return capacity * (1 - MARGIN)


class ScoreRouter:
    """A router of kind similarity, linear or random."""

    def __init__(self, rule: RouterRule, scores: Mapping[int, LayerScore] | None = None) -> None:
        """``scores``: for kind linear, by layer."""
        self.rule, self._scores = rule, scores or {}
        self._terms: dict[int, Terms] = {}

    @property
    def needs_trace(self) -> bool:
        """Whether it needs what the last layer did to each row."""
        return self.rule.kind == "similarity"

    def terms(self, layer: int) -> Terms:
        """The terms of the decision in ``layer``; tensors on the host."""
        found = self._terms.get(layer)
        if found is None:
            found = self._terms[layer] = self._make_terms(layer)
        return found

    def terms_on(self, layer: int, device: torch.device) -> Terms:
        """``terms`` with tensors on a device."""
        terms = self.terms(layer)
        if terms.weight is None or terms.weight.device == device:
            return terms
        return replace(terms, weight=terms.weight.to(device))

    def decide(self, context: RoutingContext) -> Decision:
        """As in ``Router``: a row skips if its score, or its group's, reaches the bar."""
        scores = self.scores(context)
        sequences, positions = (
            rows.to(scores.device) for rows in (context.sequences, context.positions)
        )
        return Decision(settle(scores, sequences, positions, self.terms(context.layer)))

    def decide_few(
        self, layer: int, positions: Sequence[int], found: Sequence[Sequence[float]] | None
    ) -> list[bool] | None:
        """``decide`` for a few rows that decide individually, in plain Python numbers.

        ``found``: cosine and change of each row's last layer. Returns ``None`` if ``decide`` must
        be used instead.
        """
        terms = self.terms(layer)
        if terms.group is not routes.Group.ROW or terms.score is Score.LINEAR:
            return None
        bar = rounded(terms.bar)
        if terms.score is Score.RANDOM:
            return [-draw_one(position, terms.salt) >= bar for position in positions]
        assert found is not None
        is_cosine = terms.score is Score.COSINE
        scores = [row[0] if is_cosine else -row[1] for row in found]
        if any(score != score for score in scores):
            return None  # ``decide`` raises the error
        return [score >= bar for score in scores]

    def scores(self, context: RoutingContext) -> Tensor:
        """``[n]``, at least fp32: the score of each candidate; higher means more likely to skip.

        Raises:
            RouterError: a score is NaN, because the hidden states are not finite.
        """
        is_linear = self.rule.kind == "linear"
        hidden = context.hidden if is_linear else torch.empty(0)
        terms = self.terms_on(context.layer, hidden.device)
        found = context.last_layer if self.needs_trace else None
        scores = score(terms, hidden, context.positions.to(hidden.device), found)
        if terms.score is not Score.RANDOM and bool(scores.isnan().any()):
            raise RouterError(
                f"{self.rule.kind} router in layer {context.layer}: a score is NaN because the "
                "hidden states are not finite; allowed: finite hidden states"
            )
        return scores

    def _make_terms(self, layer: int) -> Terms:
        rule = self.rule
        group = routes.Group.ROW if rule.group is None else routes.Group(rule.group.value)
        mean = routes.Agreement.MEAN
        agreement = mean if rule.agree is None else routes.Agreement(rule.agree.value)
        if rule.kind == "random":
            assert rule.rate is not None
            # Routers of one seed and layer draw independently if they guard different sublayers.
            guarded = (Sublayer.ATTENTION in rule.skip) + 2 * (Sublayer.FFN in rule.skip)
            salt = mixed(mixed(rule.seed or 0) ^ mixed(4 * layer + guarded + 1))
            return Terms(
                score=Score.RANDOM, bar=-rule.rate, salt=salt, group=group, agreement=agreement
            )
        if rule.kind == "linear":
            own = self._scores[layer]
            bar = 0.0 if rule.threshold is None else -rule.threshold
            return Terms(
                score=Score.LINEAR,
                bar=bar,
                weight=own.weight,
                bias=own.bias,
                group=group,
                agreement=agreement,
                capacity=None if rule.capacity is None else as_decimal(rule.capacity),
            )
        assert rule.threshold is not None
        is_change = rule.measure is Measure.CHANGE
        return Terms(
            score=Score.CHANGE if is_change else Score.COSINE,
            bar=-rule.threshold if is_change else rule.threshold,
            group=group,
            agreement=agreement,
        )
