"""Draw a policy's map: one box per layer and token class, attention above, FFN below."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from fastskip.study.report.drawing import NARROW, Colour, Form, Picture, figure_of, picture
from fastskip.study.report.policy_map import MapCell, PolicyMap, State

# All lengths are in points.
_MARGIN = 4.0
_NAMES = 58.0
"""Space left of the boxes for the names of token classes."""
_HALF = 9.0
"""Height of half a box."""
_GAP = 3.0
_WIRING = 11.0
"""Space above the boxes for the marks of parallel and pair arrangements."""
_NUMBERS = 15.0
"""Space below the boxes for layer numbers."""
_WIDEST = 24.0
_LEGEND = 15.0
_ENTRY = 112.0
"""Width of a legend entry."""


def policy_chart(name: str, label: str, found: PolicyMap) -> Picture:
    """The chart of one policy's map."""
    return picture(name, f"What {label} runs. {found.text}.", lambda form: draw(found, form))


def draw(found: PolicyMap, form: Form) -> Any:
    """Layers run left to right, wrapped to as many lines as they need."""
    most = 16 if form.is_narrow else 40
    count = -(-found.depth // most)
    per_line = -(-found.depth // count)
    room = 72 * form.width - _NAMES - 2 * _MARGIN
    box = min(_WIDEST, room / per_line)
    width = 72 * NARROW.width if form.is_narrow else _NAMES + 2 * _MARGIN + per_line * box
    width = max(width, 72 * NARROW.width)
    line = _above(found) + len(found.classes) * (2 * _HALF + _GAP) + _NUMBERS
    entries = list(_entries(found))
    columns = int((width - 2 * _MARGIN) // _ENTRY)
    legend = _LEGEND * -(-len(entries) // columns)
    height = count * line + legend + _MARGIN
    figure = figure_of(width / 72, height / 72)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    for number in range(count):
        layers = range(number * per_line, min((number + 1) * per_line, found.depth))
        _line(axis, found, layers, number * line, box, form)
    for place, (state, colour) in enumerate(entries):
        x = _MARGIN + place % columns * (width - 2 * _MARGIN) / columns
        y = count * line + place // columns * _LEGEND + 3
        _half(axis, x, y, _HALF * 1.5, state, colour, 1.0)
        text = _caption(state, colour)
        axis.text(x + 1.5 * _HALF + 4, y + _HALF / 2, text, va="center", fontsize=form.font - 1)
    return figure


def _line(axis: Any, found: PolicyMap, layers: range, top: float, box: float, form: Form) -> None:
    """Draw the boxes of some layers."""
    boxes = top + _above(found)
    for place, token_class in enumerate(found.classes):
        y = boxes + place * (2 * _HALF + _GAP)
        axis.text(_MARGIN, y + _HALF, token_class.value, va="center", fontsize=form.font - 0.5)
        cells = found.cells[token_class][layers.start : layers.stop]
        _runs(axis, cells, y, box, is_attention=True)
        _runs(axis, cells, y + _HALF, box, is_attention=False)
        between = [_NAMES + number * box for number in range(1, len(layers))]
        axis.vlines(between, y, y + 2 * _HALF, color=Colour.PAPER.value, lw=1.4, zorder=2)
    bottom = boxes + len(found.classes) * (2 * _HALF + _GAP)
    step = next(each for each in (1, 2, 4, 8) if each * box >= 2.1 * form.font)
    step = 1 if box >= 1.5 * form.font else step
    small = {"ha": "center", "fontsize": form.font - 1.5, "color": Colour.MUTED.value}
    for layer in layers:
        middle = _NAMES + (layer - layers.start + 0.5) * box
        if layer % step == 0:
            axis.text(middle, bottom + 1, str(layer), va="top", **small)
        if layer in found.parallel:
            style = {"color": Colour.PURPLE.value, "lw": 1.6, "solid_capstyle": "butt"}
            for x in (middle - 1.8, middle + 1.8):
                axis.plot([x, x], [boxes - 9, boxes - 2], "-", **style)
    for first in found.pairs:
        for layer in (first, first + 1):
            if layer in layers:
                _bracket(axis, layer, first, layers, boxes, box)
    axis.text(_MARGIN, bottom + 1, "layer", va="top", **{**small, "ha": "left"})
    for removal in found.removals:
        if removal.after_layer in layers:
            x = _NAMES + (removal.after_layer - layers.start + 1) * box
            style = {"color": Colour.RED.value, "lw": 1.8}
            axis.plot([x, x], [boxes - 4, bottom - _GAP + 2], "-", **style)


def _above(found: PolicyMap) -> float:
    """The space above the boxes, larger if anything is drawn there."""
    return _WIRING if found.parallel or found.pairs else 5.0


def _bracket(axis: Any, layer: int, first: int, layers: range, boxes: float, box: float) -> None:
    """Draw one half of the bracket over a pair, since a line break may separate its layers."""
    x = _NAMES + (layer - layers.start) * box
    left, right = x + (2 if layer == first else 0), x + box - (2 if layer != first else 0)
    end = left if layer == first else right
    style = {"color": Colour.PURPLE.value, "lw": 1.6}
    axis.plot([left, right], [boxes - 6, boxes - 6], "-", **style)
    axis.plot([end, end], [boxes - 6, boxes - 1], "-", **style)


def _runs(
    axis: Any, cells: tuple[MapCell, ...], y: float, box: float, *, is_attention: bool
) -> None:
    """Draw halves of boxes, merging equal neighbours into one shape to keep the file small."""
    colour = Colour.BLUE if is_attention else Colour.ORANGE
    halves = [(cell.attention if is_attention else cell.ffn, cell.share) for cell in cells]
    place = 0
    for (state, share), group in groupby(halves):
        count = len(list(group))
        if state is State.RUNS and share == 1:
            _half(axis, _NAMES + place * box, y, count * box, state, colour, share)
        else:
            for number in range(place, place + count):
                _half(axis, _NAMES + number * box, y, box, state, colour, share)
        place += count


def _half(
    axis: Any, x: float, y: float, width: float, state: State, colour: Colour, share: float
) -> None:
    """Draw half a box, filled to the share of rows that removals have left."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), width, _HALF, facecolor=Colour.SHADE.value, lw=0))
    here = width * share
    if state is State.RUNS:
        axis.add_patch(Rectangle((x, y), here, _HALF, facecolor=colour.value, lw=0))
    elif state is State.ROUTED:
        style: dict[str, Any] = {"facecolor": "none", "hatch": "/////", "lw": 0}
        axis.add_patch(Rectangle((x, y), here, _HALF, edgecolor=colour.value, **style))
    elif state is not State.NOTHING:
        marker = {State.OWN_KV: "o", State.COPIED_KV: "<", State.HIDDEN_KV: "D"}[state]
        axis.plot([x + here / 2], [y + _HALF / 2], marker, color=colour.value, ms=4, mew=0)


def _entries(found: PolicyMap) -> Iterator[tuple[State, Colour]]:
    """The legend's entries: the states that occur in the map."""
    every = [cell for token_class in found.classes for cell in found.cells[token_class]]
    for state in State:
        if state is not State.NOTHING and any(cell.attention is state for cell in every):
            yield state, Colour.BLUE
        if state in (State.RUNS, State.ROUTED) and any(cell.ffn is state for cell in every):
            yield state, Colour.ORANGE


def _caption(state: State, colour: Colour) -> str:
    half = "attention" if colour is Colour.BLUE else "FFN"
    if state is State.RUNS:
        return half
    return f"{half}, routed" if state is State.ROUTED else state.value
