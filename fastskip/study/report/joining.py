"""Join results of several commands by policy and model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.intervals import Spread
from fastskip.study.report.accuracy_chart import DENSE, KINDS, POLICY, Point, Quantity
from fastskip.study.report.bench_file import BenchResult, Timed
from fastskip.study.report.eval_file import EvalResult
from fastskip.study.report.search_file import SearchResult


def policy_key(policy: Mapping[str, Any] | None) -> str:
    """Equal for policies with equal content, whatever their names."""
    content = {
        name: value
        for name, value in (policy or {}).items()
        if name not in ("name", "provenance", "schema_version") and value not in ([], None, "clean")
    }
    return json.dumps(content, sort_keys=True)


IS_DENSE = policy_key(None)


@dataclass(frozen=True, slots=True)
class TimedPoints:
    """The points of one chart, and the source of their times in words."""

    quantity: Quantity
    points: tuple[Point, ...]
    times: str


def timed_by(result: EvalResult, benches: Sequence[BenchResult]) -> BenchResult | None:
    """The first bench of the same model that timed dense and another of the policies, if any."""
    wanted = {policy_key(each.policy) for each in result.judged}
    for bench in benches:
        found = wanted & bench_times(bench).keys()
        same = result.circumstances.is_same_model(bench.circumstances)
        if same and IS_DENSE in found and len(found) > 1:
            return bench
    return None


def bench_times(bench: BenchResult) -> dict[str, Timed]:
    """The measurements of fastskip's own contenders, by `policy_key`."""
    found: dict[str, Timed] = {}
    for contender, timed in bench.timed:
        if contender.source == "fastskip":
            found.setdefault(policy_key(contender.policy), timed)
    return found


def eval_points(result: EvalResult, benches: Sequence[BenchResult]) -> list[TimedPoints]:
    """Scores against times: from a bench, with quartiles, if there is one; else the run's own."""
    bench = timed_by(result, benches)
    found = []
    for quantity in (Quantity.TTFT, Quantity.TPOT):
        points = []
        for number, each in enumerate(result.judged, start=1):
            is_dense = each is result.dense
            own = each.ttft_s if quantity is Quantity.TTFT else each.tpot_s
            spread = None if own is None else Spread(own, own, own)
            if bench is not None:
                # a baseline that runs the dense policy, such as smaller images, is in no bench
                is_rival = policy_key(each.policy) == IS_DENSE and not is_dense
                timed = None if is_rival else bench_times(bench).get(policy_key(each.policy))
                spread = None if timed is None else _of(timed, quantity)
            if spread is not None:
                points.append(
                    Point(
                        number,
                        each.label,
                        DENSE if is_dense else POLICY,
                        cost=1e3 * spread.median,
                        low=None if bench is None else 1e3 * spread.low,
                        high=None if bench is None else 1e3 * spread.high,
                        score=each.score,
                    )
                )
        times = f"this run's medians on the first item, batch 1, {result.new_tokens} new tokens"
        if bench is not None:
            times = f"from the bench in {bench.source} ({workload_text(bench)})"
            times += "; horizontal bars: quartiles"
            shown = {point.number for point in points}
            missing = [e.label for n, e in enumerate(result.judged, start=1) if n not in shown]
            times += f"; not timed there: {', '.join(missing)}" if missing else ""
        found.append(TimedPoints(quantity, tuple(points), times))
    return [each for each in found if each.points]


def search_points(result: SearchResult) -> list[TimedPoints]:
    """Scored candidates against TTFT, TPOT and, if it is the budget's quantity, FLOPs."""
    found = []
    for quantity in Quantity:
        if quantity is Quantity.FLOPS and result.quantity is not quantity:
            continue
        points = []
        for number, each in enumerate(result.candidates, start=1):
            cost = {
                Quantity.TTFT: each.ttft_s and 1e3 * each.ttft_s,
                Quantity.TPOT: each.tpot_s and 1e3 * each.tpot_s,
                Quantity.FLOPS: each.flops and 100 * each.flops,
            }[quantity]
            if cost is not None and each.score is not None:
                points.append(
                    Point(
                        number,
                        each.name,
                        KINDS[each.source],
                        cost=cost,
                        low=None,
                        high=None,
                        score=each.score,
                        # the front is defined in the budget's quantity only
                        is_on_front=each.is_on_front and result.quantity is quantity,
                        is_recommended=each.is_recommended,
                    )
                )
        is_planned = quantity is Quantity.FLOPS
        times = "from the plan" if is_planned else "medians measured by the search"
        found.append(TimedPoints(quantity, tuple(points), times))
    return sorted((p for p in found if p.points), key=lambda p: p.quantity is not result.quantity)


def workload_text(bench: BenchResult) -> str:
    """A bench's workload in words."""
    load = bench.workload
    texts = "/".join(map(str, dict.fromkeys(bench.texts or (load["n_text"],))))
    return (
        f"batch {load['batch']}, {load['n_image']} image and {texts} text rows, "
        f"{load['new_tokens']} new tokens, {load['rounds']} rounds"
    )


def _of(timed: Timed, quantity: Quantity) -> Spread:
    return timed.ttft_s if quantity is Quantity.TTFT else timed.tpot_s
