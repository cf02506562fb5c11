"""Routers: which rows skip a sublayer, decided from data at run time."""

from fastskip.routing.protocol import (
    AttentionWeights,
    Decision,
    Router,
    RouterError,
    RoutingContext,
    Scope,
)
from fastskip.routing.record import Decisions, RoutingRecord
from fastskip.routing.registry import ENTRY_POINTS, build_routers
from fastskip.routing.routers import ScoreRouter

__all__ = [
    "ENTRY_POINTS",
    "AttentionWeights",
    "Decision",
    "Decisions",
    "Router",
    "RouterError",
    "RoutingContext",
    "RoutingRecord",
    "Scope",
    "ScoreRouter",
    "build_routers",
]
