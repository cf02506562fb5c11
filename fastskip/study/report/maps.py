"""Which policies get a map, and for which model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.plan import ModelShape, shape_of_depth
from fastskip.policy import PolicyError
from fastskip.study.report.circumstances import Circumstances
from fastskip.study.report.fields import ReportError
from fastskip.study.report.joining import IS_DENSE, policy_key
from fastskip.study.report.policy_map import PolicyMap, map_policy
from fastskip.study.report.results import Results

ShapeOf = Callable[[Circumstances], ModelShape | None]


@dataclass(frozen=True, slots=True)
class Mapped:
    """One policy: its names in the results, and its map, or why there is none."""

    label: str
    found: PolicyMap | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Named:
    """A policy as named in a result; `where`: the command that wrote the result."""

    label: str
    policy: Mapping[str, Any]
    circumstances: Circumstances
    where: str

    @property
    def key(self) -> tuple[str, str]:
        """Equal for the same policy of the same model."""
        about = self.circumstances
        return about.model_fingerprint or about.model, policy_key(self.policy)


def maps(results: Results, shape_of: ShapeOf, layers: int | None = None) -> list[Mapped]:
    """A map of every policy but dense, one per model; random candidates only if on the front.

    Args:
        results: the results that name the policies.
        shape_of: the shape of a model, `None` if its config is not available.
        layers: the depth of models whose config is not available and whose depth no search records.
    Raises:
        ReportError: `layers` contradicts a model's known depth.
    """
    grouped: dict[tuple[str, str], list[_Named]] = {}
    for named in _policies(results):
        if named.key[1] != IS_DENSE:
            grouped.setdefault(named.key, []).append(named)
    names = [dict.fromkeys(named.label for named in group) for group in grouped.values()]
    counts = Counter(label for labels in names for label in labels)
    known = _with_depths(results, shape_of, layers)
    found = []
    for labels, group in zip(names, grouped.values(), strict=True):
        # commands may use one name for different policies
        where = {each.label: each.where for each in group}
        unique = (f"{x} ({where[x]})" if counts[x] > 1 else x for x in labels)
        found.append(_mapped(" = ".join(unique), group[0], known))
    return found


def _with_depths(results: Results, shape_of: ShapeOf, layers: int | None) -> ShapeOf:
    """`shape_of`, falling back to the depth that a search of the same model records, then to
    `layers`."""

    def known(circumstances: Circumstances) -> ModelShape | None:
        found = shape_of(circumstances)
        for search in results.searches if found is None else ():
            if search.depth is not None and search.circumstances.is_same_model(circumstances):
                return shape_of_depth(search.depth)
        return found

    def find(circumstances: Circumstances) -> ModelShape | None:
        found = known(circumstances)
        if layers is None:
            return found
        if found is not None and found.depth != layers:
            allowed = f"{found.depth}, the depth of {circumstances.model_name}, or no --layers"
            raise ReportError(Path("--layers"), "", layers, allowed)
        return found or shape_of_depth(layers)

    return find


def _policies(results: Results) -> Iterator[_Named]:
    for search in results.searches:
        for each in sorted(search.candidates, key=lambda one: not one.is_recommended):
            is_shown = each.source != "random" and each.score is not None
            if is_shown or each.is_on_front or each.is_recommended:
                yield _Named(each.name, each.policy, search.circumstances, "search")
    for run in results.evals:
        for judged in run.judged:
            yield _Named(judged.label, judged.policy, run.circumstances, "eval")
    for bench in results.benches:
        for contender in bench.contenders:
            if contender.policy is not None:
                yield _Named(contender.label, contender.policy, bench.circumstances, "bench")


def _mapped(label: str, named: _Named, shape_of: ShapeOf) -> Mapped:
    shape = shape_of(named.circumstances)
    if shape is None:
        model = named.circumstances.model_name
        return Mapped(label, None, f"the depth of {model} is unknown")
    try:
        return Mapped(label, map_policy(named.policy, shape))
    except PolicyError as error:
        return Mapped(label, None, str(error))
