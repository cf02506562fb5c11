"""What share of its candidates each router lets skip, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.policy import RouterRule

_SET = ("threshold", "capacity", "rate")


@dataclass(frozen=True, slots=True)
class Share:
    """How many of one router's candidates skipped in one layer.

    `possible`: the share, over all of the router's candidates, closest to the target that any
    threshold gives on the observed scores (equal scores skip together). `None` if the router has no
    threshold.
    """

    router: int
    layer: int
    rule: RouterRule
    candidates: int
    skipped: int
    possible: float | None = None

    @property
    def achieved(self) -> float:
        """The share that skipped."""
        return self.skipped / self.candidates if self.candidates else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        written = self.rule.to_dict()
        return {
            "router": self.router,
            "layer": self.layer,
            "candidates": self.candidates,
            "achieved": round(self.achieved, 6),
            **{name: written[name] for name in _SET if name in written},
        }


def by_router(shares: Iterable[Share]) -> dict[int, list[Share]]:
    """The shares of each router."""
    groups: dict[int, list[Share]] = {}
    for share in shares:
        groups.setdefault(share.router, []).append(share)
    return groups


def by_threshold(shares: Iterable[Share]) -> list[list[Share]]:
    """The shares grouped by router, for routers with a threshold only."""
    return list(by_router(each for each in shares if each.possible is not None).values())


def pooled(shares: Sequence[Share]) -> float:
    """The share of all their candidates that skipped; 0 if there are none."""
    candidates = sum(share.candidates for share in shares)
    return sum(share.skipped for share in shares) / candidates if candidates else 0.0
