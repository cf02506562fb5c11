"""Which policies get a map, and on what model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastskip.plan import ModelShape
from fastskip.policy import PolicyError
from fastskip.study.report.circumstances import Circumstances
from fastskip.study.report.joining import IS_DENSE, policy_key
from fastskip.study.report.policy_map import PolicyMap, map_policy, shape_of_depth
from fastskip.study.report.results import Results

ShapeOf = Callable[[Circumstances], ModelShape | None]


@dataclass(frozen=True, slots=True)
class Mapped:
    """One policy: its names in the results, and its map, or why there is none."""

    labels: tuple[str, ...]
    found: PolicyMap | None
    problem: str = ""

    @property
    def label(self) -> str:
        """All of its names."""
        return " = ".join(self.labels)


def maps(results: Results, shape_of: ShapeOf) -> list[Mapped]:
    """A map of every policy but dense, once a model; searches' random ones only on the front."""
    grouped: dict[tuple[str, str], tuple[list[str], Mapping[str, Any], Circumstances]] = {}
    for label, policy, circumstances in _policies(results):
        key = policy_key(policy)
        if key != IS_DENSE:
            place = circumstances.model_fingerprint or circumstances.model, key
            labels, _, _ = grouped.setdefault(place, ([], policy, circumstances))
            if label not in labels:
                labels.append(label)
    known = _with_depths(results, shape_of)
    return [_mapped(*each, known) for each in grouped.values()]


def _with_depths(results: Results, shape_of: ShapeOf) -> ShapeOf:
    """Where a model is not at hand, the depth that a search of the same model tells will do."""

    def find(circumstances: Circumstances) -> ModelShape | None:
        found = shape_of(circumstances)
        for search in results.searches if found is None else ():
            if search.depth is not None and search.circumstances.is_same_model(circumstances):
                return shape_of_depth(search.depth)
        return found

    return find


def _policies(results: Results) -> Iterator[tuple[str, Mapping[str, Any], Circumstances]]:
    for search in results.searches:
        for each in sorted(search.candidates, key=lambda one: not one.is_recommended):
            is_shown = each.source != "random" and each.score is not None
            if is_shown or each.is_on_front or each.is_recommended:
                yield each.name, each.policy, search.circumstances
    for run in results.evals:
        for judged in run.judged:
            yield judged.label, judged.policy, run.circumstances
    for bench in results.benches:
        for contender in bench.contenders:
            if contender.policy is not None:
                yield contender.label, contender.policy, bench.circumstances


def _mapped(
    labels: list[str], policy: Mapping[str, Any], circumstances: Circumstances, shape_of: ShapeOf
) -> Mapped:
    shape = shape_of(circumstances)
    if shape is None:
        return Mapped(tuple(labels), None, f"the depth of {circumstances.model_name} is not known")
    try:
        return Mapped(tuple(labels), map_policy(policy, shape))
    except PolicyError as error:
        return Mapped(tuple(labels), None, str(error))
