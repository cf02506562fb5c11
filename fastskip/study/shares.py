"""How many of its candidates each router let skip, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.policy import RouterRule

_SET = ("threshold", "capacity", "rate")


@dataclass(frozen=True, slots=True)
class Share:
    """What one router did in one layer: how many of its candidates skipped.

    `possible`: the share of all of its candidates, nearest to the wanted one, that any threshold
    gives, as scores were: equal scores skip together. `None` where there is no threshold to set.
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


def by_threshold(shares: Sequence[Share]) -> list[list[Share]]:
    """The shares of each router with a threshold; rates and capacities are what they are."""
    groups: dict[int, list[Share]] = {}
    for share in shares:
        if share.possible is not None:
            groups.setdefault(share.router, []).append(share)
    return list(groups.values())


def pooled(shares: Sequence[Share]) -> float:
    """The share of all their candidates that skipped; 0 without any."""
    candidates = sum(share.candidates for share in shares)
    return sum(share.skipped for share in shares) / candidates if candidates else 0.0
