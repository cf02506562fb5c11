"""What charts show, read back from what was drawn."""

import re
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from fastskip.intervals import Estimate, Spread
from fastskip.plan import make_plan, shape_of_depth
from fastskip.policy import PolicyError, SkippedKV, SkipPolicy, TokenClass
from fastskip.study.report import accuracy_chart, cost_chart, heat_chart, policy_chart
from fastskip.study.report.accuracy_chart import DENSE, POLICY, Point, Quantity
from fastskip.study.report.bench_file import Contender, PerPhase, Timed
from fastskip.study.report.drawing import HEAT, NARROW, WIDE, Colour, figure_of, picture
from fastskip.study.report.heat_chart import HeatMap
from fastskip.study.report.policy_map import PolicyMap, State, map_policy
from fastskip.study.report.search_file import Sensitivity
from tests.study.report.files import DEPTH, EVIL, REMOVING, ROUTED

SHAPE = shape_of_depth(DEPTH)


def point(number: int, mean: float, cost: float, **options: Any) -> Point:
    kind = DENSE if number == 1 else POLICY
    estimate = Estimate(mean, mean - 0.05, min(1.0, mean + 0.02))
    return Point(number, f"p{number}", kind, cost, 0.9 * cost, 1.1 * cost, estimate, **options)


def test_points_lie_where_their_numbers_say() -> None:
    points = [point(1, 0.9, 30.0), point(2, 0.85, 20.0, is_recommended=True), point(3, 0.8, 25.0)]
    figure = accuracy_chart.draw(Quantity.TTFT, points, WIDE)
    (axis,) = figure.axes
    marks = {
        (round(float(x), 6), round(float(y), 6))
        for line in axis.lines
        if line.get_marker() not in ("None", None, "")
        for x, y in line.get_xydata()
    }
    assert marks == {(30.0, 90.0), (20.0, 85.0), (25.0, 80.0)}
    bars = [s for bar in axis.collections for s in bar.get_segments()]
    ends = {tuple(round(float(v), 6) for v in segment.ravel()) for segment in bars}
    assert (30.0, 85.0, 30.0, 92.0) in ends  # the 95 % interval
    assert (18.0, 85.0, 22.0, 85.0) in ends  # the quartiles of the time
    assert {text.get_text() for text in axis.texts} == {"1 p1", "2 p2", "3 p3"}
    assert axis.get_xlabel().startswith("TTFT, ms")


def words_alone(text: Any) -> Any:
    """Where the words stand, without the line that leads to them."""
    text.get_window_extent()  # puts it in its place
    return Text.get_window_extent(text)


def test_names_do_not_cover_each_other() -> None:
    points = [point(n, 0.9 + 0.001 * n, 30.0 + 0.05 * n) for n in range(1, 9)]
    figure = accuracy_chart.draw(Quantity.TPOT, points, WIDE)
    boxes = [words_alone(text) for text in figure.axes[0].texts]
    assert len(boxes) == 8 and all(box.count_overlaps(boxes) == 1 for box in boxes)
    narrow = accuracy_chart.draw(Quantity.TPOT, points, NARROW)
    assert {text.get_text() for text in narrow.axes[0].texts} == {str(n) for n in range(1, 9)}


def test_what_is_near_dense_is_enlarged_where_others_are_far() -> None:
    points = [point(1, 0.95, 3.0), point(2, 0.94, 2.0), point(3, 0.93, 2.5), point(4, 0.2, 1.0)]
    upper, lower = accuracy_chart.draw(Quantity.FLOPS, points, WIDE).axes
    assert {text.get_text() for text in upper.texts} == {"1 p1", "4 p4"}
    assert {text.get_text() for text in lower.texts} == {"1 p1", "2 p2", "3 p3"}


def test_bars_are_medians_and_strokes_floors() -> None:
    def timed(scale: float, floor: PerPhase | None) -> Timed:
        spread = Spread(scale, 0.9 * scale, 1.2 * scale)
        share = None if floor is None else PerPhase(0.8, 0.7)
        rest: tuple[Any, ...] = (spread, spread, 1.0, None, None, None, floor, share, {}, {})
        return Timed(spread, Spread(scale / 10, scale / 11, scale / 9), *rest)

    both = [
        (Contender("a", "hf", None, None, None), timed(0.2, None)),
        (Contender("b", "fastskip", {}, None, None), timed(0.1, PerPhase(0.04, 0.005))),
    ]
    prefill, decode = cost_chart.draw(both, WIDE).axes
    for axis, scale, floor, share in ((prefill, 1e3, 40, "0.80"), (decode, 1e2, 5, "0.70")):
        assert [bar.get_width() for bar in axis.patches] == pytest.approx(
            [0.2 * scale, 0.1 * scale]
        )
        strokes = [s for c in axis.collections for s in c.get_segments() if s[0][0] == s[1][0]]
        assert floor in [pytest.approx(stroke[0][0]) for stroke in strokes]
        assert [text.get_text() for text in axis.texts] == [f"{share} of ideal"]


def test_the_heat_map_has_a_colour_for_every_cell() -> None:
    kinds = ("image: no FFN", "text: no FFN", "image: no attention, K/V reuse")
    cells = [Sensitivity(n, kind, 10.0 ** (n - 4), None, None) for kind in kinds for n in range(5)]
    cells = [each for each in cells if (each.layer, each.kind) != (0, kinds[2])]
    found = HeatMap.of(cells)
    assert found.kinds == (kinds[0], kinds[2], kinds[1])  # of the same tokens beside each other
    assert found.colour(1e-4) is HEAT[0] and found.colour(0.0) is HEAT[0]
    assert found.colour(1.0) is HEAT[-1]
    ranks = [HEAT.index(found.colour(10.0**n)) for n in range(-4, 1)]
    assert ranks == sorted(ranks) and len(set(ranks)) == 5
    for form in (WIDE, NARROW):
        (axis,) = heat_chart.draw(found, form).axes
        colours = [to_hex(each) for each in axis.collections[0].get_facecolor()]
        assert len(colours) == len(cells)
        assert colours[:5] == [found.colour(10.0 ** (n - 4)).value for n in range(5)]
        assert len(axis.lines[0].get_xydata()) == 1  # a dot where nothing was tried
    many = [Sensitivity(0, f"image: {n}", 1.0, None, None) for n in range(20)]
    assert len(heat_chart.draw(HeatMap.of(many), NARROW).axes) == 2


@pytest.mark.parametrize(
    "name",
    ["image_ffn", "frozen_visual", "visual_withdrawal", "every_nth_attention", "block_pairs"],
)
def test_the_map_is_the_plan(name: str) -> None:
    options = {"after": 3} if name == "visual_withdrawal" else {}
    policy = SkipPolicy.preset(name, **options)
    plan, found = make_plan(policy, SHAPE), map_policy(policy.to_dict(), SHAPE)
    left = {SkippedKV.PROJECT: State.OWN_KV, SkippedKV.OMIT: State.NOTHING}
    for layer in plan.layers:
        for token_class, cell in layer.cells.items():
            shown = found.cells[token_class][layer.index]
            attention = State.RUNS if cell.kv is None else left[cell.kv]
            assert shown.attention is attention
            assert shown.ffn is (State.RUNS if cell.ffn else State.NOTHING)
    assert found.pairs == ((2, 4) if name == "block_pairs" else ())
    assert "layers 0" in found.text


def test_routers_removals_and_copies_are_in_the_map() -> None:
    routed = map_policy(ROUTED, SHAPE).cells
    assert [cell.ffn is State.ROUTED for cell in routed[TokenClass.TEXT]] == [
        2 <= layer < 6 for layer in range(DEPTH)
    ]
    assert all(cell.attention is State.RUNS for cell in routed[TokenClass.TEXT])
    removing = map_policy(REMOVING, SHAPE)
    assert [cell.share for cell in removing.cells[TokenClass.IMAGE]] == [1, 1] + [0.5] * 6
    assert {cell.share for cell in removing.cells[TokenClass.TEXT]} == {1}
    assert removing.removals[0].text == "after layer 1: 50% of image rows stay, by attention"
    rule = {"layers": [3], "tokens": ["text"], "skip": ["attention"], "kv": "reuse"}
    copying = map_policy({"schema_version": 1, "rules": [rule]}, SHAPE)
    assert copying.cells[TokenClass.TEXT][3].attention is State.COPIED_KV
    with pytest.raises(PolicyError, match="bounds"):
        map_policy(SkipPolicy.preset("visual_withdrawal", after=15).to_dict(), SHAPE)


def test_a_map_in_words_says_layer_of_one_and_layers_of_several() -> None:
    rule = {"layers": [3], "tokens": ["text"], "skip": ["ffn"]}
    text = map_policy({"schema_version": 1, "rules": [rule]}, SHAPE).text
    assert [part.split(" (")[0] for part in text.split("; ")] == [
        "layers 0-2",
        "layer 3",
        f"layers 4-{DEPTH - 1}",
    ]


def filled(found: PolicyMap, colour: Colour) -> float:
    """How much of a colour is in the drawing, in whole half boxes, without its legend."""
    figure = policy_chart.draw(found, WIDE)
    patches = [p for p in figure.axes[0].patches if to_hex(p.get_facecolor()) == colour.value]
    box = 24.0
    return float(sum(p.get_width() for p in patches if p.get_x() >= 57 or p.get_width() > 20)) / box


@pytest.mark.parametrize("name", ["image_ffn", "every_nth_block"])
def test_the_drawing_is_the_map(name: str) -> None:
    found = map_policy(SkipPolicy.preset(name).to_dict(), SHAPE)
    every = [cell for cells in found.cells.values() for cell in cells]
    in_legend = 9 * 1.5 / 24  # of FFN, the second entry
    ffn = sum(cell.ffn is State.RUNS for cell in every)
    assert filled(found, Colour.ORANGE) == pytest.approx(ffn + in_legend)
    assert filled(found, Colour.BLUE) == pytest.approx(
        sum(cell.attention is State.RUNS for cell in every)
    )


def test_a_picture_is_a_part_of_the_page() -> None:
    def draw(form: Any) -> Any:
        figure = figure_of(2, 1)
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], "o", color=Colour.BLUE.value, clip_on=True)
        axis.set_title(EVIL)
        return figure

    made = picture("one", "a line", draw)
    assert made.png.startswith(b"\x89PNG")
    assert picture("one", "a line", draw) == made  # the same every time
    for svg, name in ((made.wide, "one-w-"), (made.narrow, "one-n-")):
        assert "<script" not in svg and "&lt;script&gt;" in svg and "$x^2$" in svg
        assert "http" not in svg and "<style" not in svg and "#1f5fa8" not in svg
        assert "var(--blue)" in svg and "var(--ink)" in svg
        ids = re.findall(r'\bid="([^"]*)"', svg)
        assert len(set(ids)) == len(ids) and all(each.startswith(name) for each in ids)
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
        assert used and {one or other for one, other in used} <= set(ids)
