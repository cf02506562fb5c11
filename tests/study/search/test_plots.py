"""The figures of a search."""

from itertools import combinations

from fastskip.plotting import subplots
from fastskip.study.search.plots import name_points


def test_names_of_near_points_do_not_cover_each_other() -> None:
    figure, ((axis,),) = subplots(1, 1, (9, 5.4))
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    name_points(axis, [("frozen_visual", 43, 80), ("shortv", 43, 80), ("even_removal", 45, 80)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
