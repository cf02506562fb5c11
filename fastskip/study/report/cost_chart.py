"""Measured prefill and decode times against the floor that the machine cannot beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastskip.study.report.bench_file import BenchResult, Contender, Timed
from fastskip.study.report.drawing import Colour, Form, Picture, figure_of, picture, shortened
from fastskip.wording import significant

PHASES = ("prefill", "decode")
_COLOURS = {"prefill": Colour.BLUE, "decode": Colour.ORANGE}


def cost_chart(name: str, result: BenchResult) -> Picture:
    """The chart of one run."""
    lines = []
    for contender, timed in result.timed:
        line = f"{contender.label}: prefill {_ms(timed.prefill_s.median)}"
        line += f", a decode step {_ms(timed.decode_s.median)}"
        if timed.floor_s is not None:
            line += f", floors {_ms(timed.floor_s.prefill)} and {_ms(timed.floor_s.decode)}"
        lines.append(line)
    text = f"Measured times against their floors. {'; '.join(lines)}."
    return picture(name, text, lambda form: draw(result.timed, form))


def draw(timed: Sequence[tuple[Contender, Timed]], form: Form) -> Any:
    """Bars of medians with quartiles; a vertical line marks the floor."""
    lines = len(timed)
    if form.is_narrow:
        figure = figure_of(form.width, 0.9 + 2 * (0.42 * lines + 0.55), layout="constrained")
        axes = figure.subplots(2, 1)
    else:
        figure = figure_of(form.width, 1.0 + 0.32 * lines, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
    for axis, phase in zip(axes, PHASES, strict=True):
        _bars(axis, phase, timed)
        names = [shortened(each.label, 16 if form.is_narrow else 26) for each, _ in timed]
        axis.set_yticks(range(lines), names, color=Colour.INK.value)
        axis.set_ylim(lines - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", frameon=False)
    return figure


def _bars(axis: Any, phase: str, timed: Sequence[tuple[Contender, Timed]]) -> None:
    spreads = [each.prefill_s if phase == "prefill" else each.decode_s for _, each in timed]
    middle = [1e3 * spread.median for spread in spreads]
    sides = [
        [1e3 * (spread.median - spread.low) for spread in spreads],
        [1e3 * (spread.high - spread.median) for spread in spreads],
    ]
    places = range(len(timed))
    style = {"ecolor": Colour.MUTED.value, "error_kw": {"elinewidth": 1.2, "capsize": 2}}
    axis.barh(places, middle, 0.62, xerr=sides, color=_COLOURS[phase].value, alpha=0.75, **style)
    floors = [
        (place, 1e3 * getattr(each.floor_s, phase))
        for place, (_, each) in enumerate(timed)
        if each.floor_s is not None
    ]
    for place, floor in floors:
        label = "floor: lower bound on this machine" if place == floors[0][0] else None
        axis.vlines(floor, place - 0.4, place + 0.4, color=Colour.INK.value, lw=2.2, label=label)
    longest = max([*(1e3 * spread.high for spread in spreads), *(floor for _, floor in floors)])
    for place, (_, each) in enumerate(timed):
        if each.ideal_share is not None:
            end = max([1e3 * spreads[place].high, *(f for p, f in floors if p == place)])
            share = f"{getattr(each.ideal_share, phase):.2f} of ideal"
            axis.text(end + 0.02 * longest, place, share, va="center", ha="left")
    has_shares = any(each.ideal_share is not None for _, each in timed)
    axis.set_xlim(0, longest * (1.5 if has_shares else 1.05) or 1)
    title = "prefill" if phase == "prefill" else "one decode step"
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set_xlabel("ms")
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def _ms(seconds: float) -> str:
    return f"{significant(1e3 * seconds)} ms"
