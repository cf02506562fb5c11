"""The demo's plots: what each policy skips, accuracy against speed, pictures with answers."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from fastskip.demo.results import Example, Report, Row
from fastskip.demo.scenes import draw
from fastskip.plan import Cell, LayerPlan
from fastskip.plot_labels import Label, place
from fastskip.plotting import save, subplots
from fastskip.policy import Arrangement, SkippedKV
from fastskip.timing import PHASES, Phase

CELLS = (
    ("attention and FFN", "#1f4e79"),
    ("attention only", "#5b9bd5"),
    ("FFN only", "#e0a03c"),
    ("K and V only", "#d9d9d9"),
    ("nothing", "#ffffff"),
)
"""What rows of a class compute in a layer, darker for more; "FFN only" may store K and V too."""


def write(report: Report, folder: Path) -> list[Path]:
    """Write all plots and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "policies": policies(report.rows),
        "accuracy_speed": accuracy_against_speed(report),
        "pictures": pictures(report.examples),
    }
    for figure in figures.values():
        figure.text(0.01, 0.008, report.footer, fontsize=7, color="#555555", va="bottom")
    return save(figures, folder, dpi=150)


def policies(rows: Sequence[Row]) -> Any:
    """One map of layers and token classes for each policy."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = [row for row in rows if row.candidate.policy is not None]
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = subplots(lines, columns, (11, 1.15 + 1.35 * lines))
    colours = ListedColormap([colour for _, colour in CELLS])
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, rows, strict=False):
        plan = row.plan
        codes = [[_code(layer.cells[each]) for layer in plan.layers] for each in plan.classes]
        axis.pcolormesh(
            np.array(codes), cmap=colours, vmin=-0.5, vmax=4.5, edgecolors="#888888", linewidth=0.6
        )
        axis.invert_yaxis()
        axis.set_title(row.candidate.label, fontsize=10)
        axis.set_xticks(np.arange(len(plan.layers)) + 0.5, range(len(plan.layers)), fontsize=8)
        axis.set_yticks(np.arange(len(plan.classes)) + 0.5, plan.classes, fontsize=8)
        axis.tick_params(length=0)
        for layer in plan.layers:
            _mark(axis, layer, len(plan.classes))
    axes[-1, 0].set_xlabel("layer", fontsize=9)  # the only axis that always exists
    used = {
        _code(cell) for row in rows for layer in row.plan.layers for cell in layer.cells.values()
    }
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", label=name)
        for code, (name, colour) in enumerate(CELLS)
        if code in used
    ]
    if any(row.candidate.is_arrangement for row in rows):
        handles.append(Patch(facecolor="none", edgecolor="none", label="∥: both from one input"))
        handles.append(
            Patch(facecolor="none", edgecolor="#d62728", linewidth=2, label="pair of blocks")
        )
    figure.legend(
        handles=handles, loc="upper center", ncols=len(handles), fontsize=8, frameon=False
    )
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.90), h_pad=0.08, w_pad=0.08)
    return figure


def _code(cell: Cell) -> int:
    if cell.attention:
        return 0 if cell.ffn else 1
    if cell.ffn:
        return 2
    return 4 if cell.kv is SkippedKV.OMIT else 3


def _mark(axis: Any, layer: LayerPlan, height: int) -> None:
    """Mark parallel sublayers and pairs across all token classes, which share them."""
    from matplotlib.patches import Rectangle

    if layer.arrangement is Arrangement.PARALLEL:
        for line in range(height):
            axis.text(layer.index + 0.5, line + 0.5, "∥", color="white", ha="center", va="center")
    if layer.partner is not None and layer.partner > layer.index:
        frame = Rectangle(
            (layer.index + 0.08, 0.08), 1.84, height - 0.16, fill=False, edgecolor="#d62728", lw=2
        )
        axis.add_patch(frame)


def accuracy_against_speed(report: Report) -> Any:
    """A point per candidate: right answers against speed relative to Hugging Face."""
    figure, axes = subplots(2, 1, (10, 10.5))
    for axis, phase in zip(axes.flat, PHASES, strict=True):
        _scatter(axis, report.rows, phase)
    load = report.workload
    asked = report.rows[0].quality.questions.asked
    figure.suptitle(
        f"{asked} held-out questions (bars: 95 % intervals); batch 1, {load.n_image} image and "
        f"{load.n_text} text rows, {load.n_new} new tokens",
        fontsize=11,
    )
    figure.get_layout_engine().set(rect=(0, 0.025, 1, 0.975), h_pad=0.12)
    coloured = list(zip(report.rows, _colours(len(report.rows)), strict=True))
    for axis, phase in zip(axes.flat, PHASES, strict=True):
        labels = [_label(row, phase, colour) for row, colour in coloured]
        place(axis, labels, size=9)
    return figure


def _scatter(axis: Any, rows: Sequence[Row], phase: Phase) -> None:
    for row, colour in zip(rows, _colours(len(rows)), strict=True):
        x, y = _point(row, phase)
        low, high = row.quality.questions.interval
        axis.errorbar(x, y, [[y - 100 * low], [100 * high - y]], color=colour, lw=1, alpha=0.4)
        axis.plot(x, y, "o", color=colour, markersize=8)
    lowest = min(100 * row.quality.questions.interval[0] for row in rows)
    places = [_point(row, phase)[0] for row in rows]
    margin = 0.15 * (max(places) - min(places)) or 0.1
    axis.set_xlim(min(places) - margin, max(places) + margin)
    axis.set_ylim(lowest - 4, 100 + 0.25 * (104 - lowest))  # room for labels over the best
    axis.set_yticks([tick for tick in axis.get_yticks() if lowest - 4 <= tick <= 100])
    axis.axvline(1.0, color="#999999", lw=0.8, ls=":")
    axis.axhline(100, color="#dddddd", lw=0.8, zorder=0)
    axis.set_xlabel("times as fast as Hugging Face")
    axis.set_ylabel("right answers, %")
    axis.set_title(phase, loc="left", fontsize=12, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)


def _label(row: Row, phase: Phase, colour: Any) -> Label:
    x, y = _point(row, phase)
    # Few questions make long bars, which would push names far away: they may be covered.
    return Label(row.candidate.label, x, y, (y, y), (x, x), colour)


def _point(row: Row, phase: Phase) -> tuple[float, float]:
    speed = row.prefill if phase == "prefill" else row.decode
    return speed.vs_hf, 100 * row.quality.questions.share


def _colours(count: int) -> list[Any]:
    """Black for Hugging Face, then dark colours that are easy to distinguish."""
    from matplotlib import colormaps

    dark = [colormaps["tab20"](2 * number) for number in range(10)]
    return ["#000000", *(dark[number % len(dark)] for number in range(count - 1))]


def pictures(examples: Sequence[Example]) -> Any:
    """Pictures over their questions and the answers."""
    columns = min(3, len(examples))
    lines = -(-len(examples) // columns)
    figure, axes = subplots(
        2 * lines, columns, (11, 0.4 + 5.5 * lines), height_ratios=[3.5, 2.0] * lines
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for number, example in enumerate(examples):
        line, column = divmod(number, columns)
        above, below = axes[2 * line, column], axes[2 * line + 1, column]
        above.imshow(draw(example.scene), interpolation="nearest")
        above.set_title(fill(example.question.text, 38), fontsize=11, fontweight="bold")
        truth = example.question.answer
        texts = [(f"truth: {truth}", "#1f4e79")]
        for label, answer in example.answers.items():
            if answer == truth:
                texts.append((f"✓ {label}", "#2a7f2a"))
            else:
                texts.append((f"✗ {label}: {answer or '(nothing)'}", "#c62828"))
        height = 1.0
        for text, colour in texts:
            wrapped = fill(text, 44, subsequent_indent="    ")
            below.text(0, height, wrapped, color=colour, fontsize=9, va="top")
            height -= 0.09 * (1.3 + wrapped.count("\n"))
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    return figure
