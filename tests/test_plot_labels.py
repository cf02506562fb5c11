"""Names beside points."""

from itertools import combinations

from matplotlib.text import Text

from fastskip.plot_labels import Label, place
from fastskip.plotting import subplots


def test_names_of_near_points_lie_apart_and_within_the_axis() -> None:
    figure, ((axis,),) = subplots(1, 1, (9, 5))
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    points = [("first", 50, 50), ("second", 50, 50), ("third", 51, 50), ("at the edge", 99, 99)]
    place(axis, [Label(text, x, y, (y - 9, y + 1), (x, x), "red") for text, x, y in points])
    figure.draw_without_rendering()
    # Of the text alone, without the line to its point.
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    marks = [axis.transData.transform((x, y)) for _, x, y in points]
    assert [text.get_text() for text in axis.texts] == [text for text, _, _ in points]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    inside = axis.get_window_extent()
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
