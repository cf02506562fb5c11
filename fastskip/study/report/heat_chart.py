"""How far the answers move if one cell alone is changed: a map of layers and kinds of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import fill
from typing import Any

from fastskip.study.report.drawing import HEAT, Colour, Form, Picture, figure_of, picture
from fastskip.study.report.search_file import Sensitivity

_WRAPPED = 6
"""Columns up to which names are wrapped in a narrow picture."""


@dataclass(frozen=True)
class HeatMap:
    """KL, in nats, by layer and kind of cell; what was not tried is not there."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    values: dict[tuple[int, str], float]

    @classmethod
    def of(cls, cells: Sequence[Sensitivity]) -> HeatMap:
        """The map of these cells; layers are all from the first on."""
        return cls(
            layers=tuple(range(max(each.layer for each in cells) + 1)),
            kinds=tuple(dict.fromkeys(each.kind for each in cells)),
            values={(each.layer, each.kind): each.kl for each in cells},
        )

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """Where a colour ends and the next begins, evenly spaced in the logarithm."""
        above = [value for value in self.values.values() if value > 0] or [1.0]
        low, high = math.log10(min(above)), math.log10(max(above))
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        low = max(low, high - 6)  # what is a million times less is nothing
        step = (high - low) / len(HEAT)
        return tuple(10 ** (low + step * number) for number in range(1, len(HEAT)))

    def colour(self, value: float) -> Colour:
        """Of a KL: the more, the further up the scale."""
        return HEAT[sum(value >= bound for bound in self.bounds)]


def heat_chart(name: str, cells: Sequence[Sensitivity]) -> Picture:
    """The chart of one search."""
    found = HeatMap.of(cells)
    ordered = sorted(cells, key=lambda each: each.kl)
    least, most = ordered[0], ordered[-1]
    text = (
        f"Sensitivity of {len(cells)} cells. Least: layer {least.layer}, {least.kind}, "
        f"{least.kl:.2g} nats. Most: layer {most.layer}, {most.kind}, {most.kl:.2g} nats. "
        "All numbers are in the table."
    )
    return picture(name, text, lambda form: draw(found, form))


def draw(found: HeatMap, form: Form) -> Any:
    """Layers from left to right; in a narrow picture from top to bottom."""
    across, down = (len(found.layers), len(found.kinds))
    if form.is_narrow:
        across, down = down, across
        # names stand upright under their columns, in as many lines as a column has room for
        wrapped = [fill(kind, 16 if across <= _WRAPPED else 60) for kind in found.kinds]
        longest = max(len(line) for name in wrapped for line in name.split("\n"))
        height = 1.1 + 0.2 * down + 0.065 * longest
        figure = figure_of(form.width, height, layout="constrained")
    else:
        figure = figure_of(form.width, 1.1 + 0.27 * down, layout="constrained")
    axis = figure.subplots()
    _cells(axis, found, form)
    axis.set_xlim(0, across)
    axis.set_ylim(down, 0)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    layers = [n for n in found.layers if n % (1 if len(found.layers) <= 24 else 2) == 0]
    ticks, kinds = [n + 0.5 for n in layers], [n + 0.5 for n in range(len(found.kinds))]
    ink = {"color": Colour.INK.value}
    if form.is_narrow:
        axis.set_yticks(ticks, layers)
        axis.set_xticks(kinds, wrapped, rotation=90, fontsize=form.font - 1, **ink)
        axis.set_ylabel("layer")
    else:
        axis.set_xticks(ticks, layers)
        axis.set_yticks(kinds, [_short(kind) for kind in found.kinds], **ink)
        axis.set_xlabel("layer")
    _legend(figure, found, form)
    return figure


def _cells(axis: Any, found: HeatMap, form: Form) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes, colours, missing = [], [], []
    for place, kind in enumerate(found.kinds):
        for layer in found.layers:
            at = (place, layer) if form.is_narrow else (layer, place)
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
        title="KL of the answers, nats: each colour from",
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


def _short(kind: str) -> str:
    return kind if len(kind) <= 40 else kind[:39] + "…"
