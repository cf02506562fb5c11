"""Sensitivity heat map: how far the answers move if one cell alone is changed, layer by kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import fill
from typing import Any

from fastskip.study.report.drawing import HEAT, Colour, Form, Picture, figure_of, picture, shortened
from fastskip.study.report.search_file import Sensitivity

_COLUMNS = 16
"""Maximum number of columns per panel of a narrow chart."""
_WRAPPED = 6
"""Up to this many columns, a narrow chart wraps their names."""


@dataclass(frozen=True)
class HeatMap:
    """KL, in nats, by layer and kind of cell; cells that were not tried are missing."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    values: dict[tuple[int, str], float]

    @classmethod
    def of(cls, cells: Sequence[Sensitivity]) -> HeatMap:
        """The map of these cells; its layers start at 0 and have no gaps."""
        return cls(
            layers=tuple(range(max(each.layer for each in cells) + 1)),
            kinds=_gathered(dict.fromkeys(each.kind for each in cells)),
            values={(each.layer, each.kind): each.kl for each in cells},
        )

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """The boundaries between colours, evenly spaced on a log scale."""
        above = [value for value in self.values.values() if value > 0] or [1.0]
        low, high = math.log10(min(above)), math.log10(max(above))
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        low = max(low, high - 6)  # a million times below the maximum is as good as zero
        step = (high - low) / len(HEAT)
        return tuple(10 ** (low + step * number) for number in range(1, len(HEAT)))

    def colour(self, value: float) -> Colour:
        """The colour of a KL: the larger, the further up the scale."""
        return HEAT[sum(value >= bound for bound in self.bounds)]


def _gathered(kinds: Iterable[str]) -> tuple[str, ...]:
    """Kinds grouped by tokens, then by what they skip, otherwise in their original order."""
    parts = [(kind.partition(":")[0], kind.partition(", K/V")[0]) for kind in kinds]
    rows, halves = ([each[at] for each in parts] for at in (0, 1))
    return tuple(
        kind
        for _, _, kind in sorted(
            zip(map(rows.index, rows), map(halves.index, halves), kinds, strict=True),
            key=lambda each: each[:2],
        )
    )


def heat_chart(name: str, cells: Sequence[Sensitivity]) -> Picture:
    """The chart of one search."""
    found = HeatMap.of(cells)
    ordered = sorted(cells, key=lambda each: each.kl)
    least, most = ordered[0], ordered[-1]
    text = (
        f"Sensitivity of {len(cells)} cells. Least: layer {least.layer}, {least.kind}, "
        f"{least.kl:.2g} nats. Most: layer {most.layer}, {most.kind}, {most.kl:.2g} nats. "
        "The table lists all values."
    )
    return picture(name, text, lambda form: draw(found, form))


def draw(found: HeatMap, form: Form) -> Any:
    """Layers run left to right; in a narrow chart, top to bottom, with the kinds split into
    panels."""
    if form.is_narrow:
        return _upright(found, form)
    down = len(found.kinds)
    figure = figure_of(form.width, 1.1 + min(0.27, 9 / down) * down, layout="constrained")
    axis = figure.subplots()
    _cells(axis, found, found.kinds, is_upright=False)
    axis.set_xlim(0, len(found.layers))
    axis.set_ylim(down, 0)
    layers = _numbered(found.layers)
    axis.set_xticks([n + 0.5 for n in layers], layers)
    names = [shortened(kind, 46) for kind in found.kinds]
    axis.set_yticks([n + 0.5 for n in range(down)], names, color=Colour.INK.value)
    axis.set_xlabel("layer")
    _legend(figure, found, form)
    return figure


def _upright(found: HeatMap, form: Form) -> Any:
    count = -(-len(found.kinds) // _COLUMNS)
    columns = -(-len(found.kinds) // count)
    panels = [found.kinds[n * columns : (n + 1) * columns] for n in range(count)]
    # names are rotated under their columns, wrapped to as many lines as a column has room for
    width = 16 if columns <= _WRAPPED else 60
    wrapped = {kind: fill(kind, width) for kind in found.kinds}
    longest = max(len(line) for name in wrapped.values() for line in name.split("\n"))
    height = 0.9 + count * (0.3 + 0.2 * len(found.layers) + 0.065 * longest)
    figure = figure_of(form.width, height, layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axis, kinds in zip(axes, panels, strict=True):
        _cells(axis, found, kinds, is_upright=True)
        axis.set_xlim(0, columns)
        axis.set_ylim(len(found.layers), 0)
        layers = _numbered(found.layers)
        axis.set_yticks([n + 0.5 for n in layers], layers)
        style = {"rotation": 90, "fontsize": form.font - 1, "color": Colour.INK.value}
        places = [n + 0.5 for n in range(len(kinds))]
        axis.set_xticks(places, [wrapped[kind] for kind in kinds], **style)
        axis.set_ylabel("layer")
    _legend(figure, found, form)
    return figure


def _numbered(layers: Sequence[int]) -> list[int]:
    return [layer for layer in layers if layer % (1 if len(layers) <= 24 else 2) == 0]


def _cells(axis: Any, found: HeatMap, kinds: Sequence[str], *, is_upright: bool) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes, colours, missing = [], [], []
    for place, kind in enumerate(kinds):
        for layer in found.layers:
            at = (place, layer) if is_upright else (layer, place)
            value = found.values.get((layer, kind))
            if value is None:
                missing.append((at[0] + 0.5, at[1] + 0.5))
            else:
                boxes.append(Rectangle(at, 1, 1))
                colours.append(found.colour(value).value)
    edge = Colour.PAPER.value
    axis.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors=edge, linewidths=1))
    if missing:
        axis.plot(*zip(*missing, strict=True), ".", color=Colour.GREY.value, ms=2.5)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)


def _legend(figure: Any, found: HeatMap, form: Form) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    every = [f"< {found.bounds[0]:.2g}", *(f"{bound:.2g}" for bound in found.bounds)]
    patches: list[Any] = [
        Patch(facecolor=colour.value, edgecolor=Colour.MUTED.value, lw=0.4, label=label)
        for colour, label in zip(HEAT, every, strict=True)
    ]
    wanted = len(found.layers) * len(found.kinds)
    if len(found.values) < wanted:
        grey = Colour.GREY.value
        patches.append(Line2D([], [], color=grey, ms=3, ls="none", marker=".", label="not tried"))
    figure.legend(
        handles=patches,
        title="KL of the answers, nats (lower bounds)",
        loc="outside lower left",
        ncols=3 if form.is_narrow else 9,
        frameon=False,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=0.9,
        handletextpad=0.4,
        alignment="left",
        title_fontsize=form.font,
        fontsize=form.font - 0.5,
    )
