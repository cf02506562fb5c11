"""The figures of a search."""

from itertools import combinations

from matplotlib.text import Text

from fastskip.intervals import Estimate
from fastskip.policy import SkipPolicy
from fastskip.study.search.plots import front
from fastskip.study.search.result import Found, SearchResult


def found(name: str, source: str, cost: float, score: float) -> Found:
    return Found(
        name=name,
        source=source,
        policy=SkipPolicy(),
        cost=cost,
        flops=cost,
        ttft_s=None,
        tpot_s=None,
        calibration_kl=0.1,
        score=Estimate(score, score - 0.1, score + 0.1),
        change=Estimate(0.0, 0.0, 0.0),
        tokens=1.0,
        kl=0.1,
        keeps_budget=True,
    )


def test_names_lie_apart_and_within_the_axis() -> None:
    candidates = (
        found("dense", "dense", 0.5, 0.8),
        found("frozen_visual", "peer", 0.43, 0.8),
        found("shortv", "peer", 0.43, 0.8),
        found("even_removal", "peer", 0.45, 0.8),
        found("a name at the edge", "peer", 1.0, 0.3),
        found("every_nth_block", "uniform", 0.6, 0.7),
    )
    result = SearchResult(
        budget={"quantity": "flops", "text": "FLOPs 60 %"},
        circumstances={},
        workload={},
        settings={},
        sensitivity=(),
        candidates=candidates,
        comparisons=(),
        left_out=(),
        recommended=None,
        text="",
    )
    figure = front(result)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    # Of the text alone, without the line to its point.
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    names = [each.name for each in candidates if each.source == "peer"]
    assert [text.get_text() for text in axis.texts] == names
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    inside = axis.get_window_extent()
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
