"""The result of a search: every candidate with its numbers, the recommendation, and the files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastskip.intervals import Estimate
from fastskip.json_file import write_json
from fastskip.policy import SkipPolicy
from fastskip.study.search.matching import LeftOut
from fastskip.study.search.sensitivity import Sensitivity
from fastskip.wording import Scale

SCHEMA_VERSION = 1
FILE = "search.json"
POLICIES = "policies"


@dataclass(frozen=True, slots=True)
class Found:
    """One candidate, judged on items that the search did not see.

    Attributes:
        name: unique among the candidates.
        source: "dense", "search", "uniform", "random", "peer" or "router".
        policy: what it skips.
        cost: estimated, as a share of dense, in the budget's quantity.
        flops: share of the dense FLOPs.
        ttft_s, tpot_s: measured medians; `None` if times were not taken.
        calibration_kl: how far it moves the answers of the calibration set, nats.
        score: on held-out items; `change`: from the dense model's, item by item.
        tokens, kl: agreement with the dense answers to held-out items.
        keeps_budget: as measured for a budget of time, by the plan for a budget of FLOPs.
        is_on_front: whether no candidate beats it in both cost and score.
        file: its policy's file, relative to the search's folder.
    """

    name: str
    source: str
    policy: SkipPolicy
    cost: float
    flops: float
    ttft_s: float | None
    tpot_s: float | None
    calibration_kl: float | None
    score: Estimate
    change: Estimate
    tokens: float
    kl: float
    keeps_budget: bool
    is_on_front: bool = False
    is_recommended: bool = False
    file: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "policy": self.policy.to_dict(),
            **self.measured(),
            "keeps_budget": self.keeps_budget,
            "is_on_front": self.is_on_front,
            "is_recommended": self.is_recommended,
            "file": self.file,
        }

    def measured(self) -> dict[str, Any]:
        """Its costs and scores, as plain data."""
        return {
            "cost": self.cost,
            "flops": self.flops,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "calibration_kl": self.calibration_kl,
            "score": asdict(self.score),
            "change": asdict(self.change),
            "agreement": {"tokens": self.tokens, "kl": self.kl},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much better the search's policy scores than another candidate, item by item."""

    name: str
    source: str
    difference: Estimate

    @property
    def is_beaten(self) -> bool:
        """Whether the candidate is beaten by more than the noise."""
        return self.difference.is_above_zero

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"name": self.name, "source": self.source, **asdict(self.difference)}


@dataclass(frozen=True)
class SearchResult:
    """Everything that a search found.

    `comparisons`: of the search's best with every uniform interval, random policy, peer and router
    at the same budget. `cheaper`: the name of the search's policy at the cost of the cheapest
    uniform interval or peer, and `comparisons_of_cheaper` its comparisons. `settings`, `latency`,
    `workload`: the conditions of the search, as plain data. `scale`: the unit of scores.
    """

    budget: Mapping[str, Any]
    circumstances: Mapping[str, Any]
    workload: Mapping[str, Any]
    settings: Mapping[str, Any]
    sensitivity: tuple[Sensitivity, ...]
    candidates: tuple[Found, ...]
    comparisons: tuple[Comparison, ...]
    left_out: tuple[LeftOut, ...]
    recommended: str | None
    text: str
    scale: Scale = Scale.SHARE
    latency: Mapping[str, Any] | None = None
    cheaper: str | None = None
    comparisons_of_cheaper: tuple[Comparison, ...] = ()
    made_for: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "search",
            "circumstances": dict(self.circumstances),
            "budget": dict(self.budget),
            "workload": dict(self.workload),
            "settings": dict(self.settings),
            "scale": self.scale.value,
            "latency": None if self.latency is None else dict(self.latency),
            "sensitivity": [each.to_dict() for each in self.sensitivity],
            "candidates": [each.to_dict() for each in self.candidates],
            "comparisons": [each.to_dict() for each in self.comparisons],
            "cheaper": None
            if self.cheaper is None
            else {
                "name": self.cheaper,
                "comparisons": [each.to_dict() for each in self.comparisons_of_cheaper],
            },
            "left_out": [{"name": each.name, "reason": each.reason} for each in self.left_out],
            "conclusion": {"recommended": self.recommended, "text": self.text},
        }

    def write(self, folder: Path) -> SearchResult:
        """Write `search.json` and a policy file for every candidate; returns the result with the
        files' names.

        Each file is written whole or not at all. Policy files of an older search in the folder (for
        another budget, say) are deleted, lest they be taken for this search's; other files stay.
        """
        older = _policy_files(folder)
        named = replace(self, candidates=tuple(self._filed(each) for each in self.candidates))
        (folder / POLICIES).mkdir(parents=True, exist_ok=True)
        for each in named.candidates:
            if each.file is not None:
                write_json(folder / each.file, self._provided(each).to_dict(), indent=2)
        for file in older - {each.file for each in named.candidates}:
            (folder / file).unlink(missing_ok=True)
        write_json(folder / FILE, named.to_dict(), indent=2)
        return named

    def _filed(self, each: Found) -> Found:
        return replace(each, file=None if each.source == "dense" else _file_of(each.name))

    def _provided(self, each: Found) -> SkipPolicy:
        """The policy with its provenance."""
        search = {
            "budget": dict(self.budget),
            "source": each.source,
            "workload": dict(self.workload),
            "settings": dict(self.settings),
            **self.circumstances,
            "measured": each.measured(),
        }
        provenance = {**each.policy.provenance, "made_for": dict(self.made_for), "search": search}
        return replace(each.policy, name=each.name, provenance=provenance)


def _file_of(name: str) -> str:
    return f"{POLICIES}/{slug(name)}.json"


def _policy_files(folder: Path) -> set[str]:
    """The policy files that the folder's `search.json` lists; none if it cannot be read."""
    try:
        candidates = json.loads((folder / FILE).read_text(encoding="utf-8"))["candidates"]
        return {_file_of(each["name"]) for each in candidates if each["file"] is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def slug(name: str) -> str:
    """A candidate's name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, score) points no other one beats: cheaper and no worse, or better at no more."""
    return [
        not any(
            (cost <= own_cost and score >= own_score) and (cost < own_cost or score > own_score)
            for cost, score in points
        )
        for own_cost, own_score in points
    ]
