"""Charts drawn with matplotlib: as wide and narrow SVG for the page, and as PNG.

In the page, colours are CSS variables, so that they follow light and dark mode; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastskip.plotting import settled

DPI = 160
_LARGER = 1.15
"""How much a chart may grow on the page if there is room."""


class Colour(StrEnum):
    """The palette on white; on the page, each is a CSS variable of the same name."""

    INK = "#1b1f24"
    MUTED = "#59636e"
    GRID = "#d9dee3"
    PAPER = "#ffffff"
    BLUE = "#1f5fa8"
    ORANGE = "#b3610a"
    GREEN = "#2a7a3b"
    PURPLE = "#7a4bb0"
    RED = "#b3261e"
    GREY = "#6b7580"
    SHADE = "#eef1f4"
    HEAT0 = "#f0f4f9"
    HEAT1 = "#d3e2f1"
    HEAT2 = "#abcbe6"
    HEAT3 = "#7aafd8"
    HEAT4 = "#4c90c5"
    HEAT5 = "#2b70ac"
    HEAT6 = "#16508a"
    HEAT7 = "#0a3163"

    @property
    def variable(self) -> str:
        """The CSS variable that stands for it on the page."""
        return f"var(--{self.name.lower()})"


HEAT = tuple(colour for colour in Colour if colour.name.startswith("HEAT"))


@dataclass(frozen=True, slots=True)
class Form:
    """How a chart is drawn: its width in inches and its font size in points."""

    width: float
    font: float
    is_narrow: bool


WIDE = Form(7.2, 9, False)
NARROW = Form(3.4, 8, True)


@dataclass(frozen=True, slots=True)
class Picture:
    """One chart in all its forms; `text`: its text alternative, for screen readers."""

    name: str
    text: str
    wide: str
    narrow: str
    png: bytes


def picture(name: str, text: str, draw: Callable[[Form], Any]) -> Picture:
    """The chart that `draw` makes, in all forms; `name`: its file name's stem, unique on a page."""
    with _style(WIDE):
        figure = settled(draw(WIDE))
        wide, png = _svg(figure, f"{name}-w"), _png(figure)
    with _style(NARROW):
        narrow = _svg(settled(draw(NARROW)), f"{name}-n")
    return Picture(name, text, wide, narrow, png)


def shortened(name: str, most: int) -> str:
    """A name cut to `most` characters, with an ellipsis if anything is cut."""
    return name if len(name) <= most else name[: most - 1] + "…"


def figure_of(width: float, height: float, **options: Any) -> Any:
    """An empty figure made without pyplot, which would keep it alive until closed."""
    from matplotlib.figure import Figure

    return Figure((width, height), **options)


@contextmanager
def _style(form: Form) -> Iterator[None]:
    from matplotlib import rc_context

    ink, muted = Colour.INK.value, Colour.MUTED.value
    settings = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": form.font,
        "axes.titlesize": form.font + 1,
        "axes.labelsize": form.font,
        "xtick.labelsize": form.font - 0.5,
        "ytick.labelsize": form.font - 0.5,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.edgecolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
        "grid.color": Colour.GRID.value,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        # policy names come from data, so a dollar sign must not start math mode
        "text.parse_math": False,
        "text.usetex": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastskip",
        "hatch.linewidth": 1.2,
    }
    with rc_context(settings):
        yield


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Any, name: str) -> str:
    """An SVG element for the page: no prolog, unique ids, the page's colours and fonts."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    width = figure.get_figwidth() * 96 * _LARGER
    # a style element here would apply to the whole page
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"\A<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", _opening(width), text, count=1)
    text = re.sub(r' font-family: [^;"]*;?', "", text).replace("xlink:href", "href")
    text = re.sub(r'\b(id|href)="(#?)([^"]+)"', rf'\1="\2{name}-\3"', text)
    text = text.replace("url(#", f"url(#{name}-")
    for colour in Colour:
        text = text.replace(colour.value, colour.variable)
    return re.sub(r"\n\s*", "\n", text)


def _opening(width: float) -> str:
    return rf'<svg \1 style="--width: {width:.0f}px" aria-hidden="true" focusable="false">'
