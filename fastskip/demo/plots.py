"""The demo's plots: what each policy leaves out, accuracy against speed, pictures with answers."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from fastskip.demo.results import Example, Report, Row
from fastskip.demo.scenes import draw
from fastskip.demo.timing import PHASES, Phase
from fastskip.plan import Cell, LayerPlan
from fastskip.policy import Arrangement, SkippedKV

CELLS = (
    ("attention and FFN", "#1f4e79"),
    ("attention only", "#5b9bd5"),
    ("FFN only", "#e0a03c"),
    ("K and V only", "#d9d9d9"),
    ("nothing", "#ffffff"),
)
"""What rows of a class do in a layer, darker for more; FFN only may store K and V too."""


class PlotsError(ImportError):
    """Plots were asked for and cannot be made."""


def require() -> None:
    """Raise `PlotsError` without matplotlib: better before the measurements than after."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsError(
            "--plots: matplotlib is missing; install it with: pip install 'fastskip[plots]'"
        ) from error
    matplotlib.use("Agg")


def write(report: Report, folder: Path) -> list[Path]:
    """Write all plots; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "policies": policies(report.rows),
        "accuracy_speed": accuracy_against_speed(report),
        "pictures": pictures(report.examples),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.text(0.01, 0.008, report.footer, fontsize=7, color="#555555", va="bottom")
        figure.savefig(paths[-1], dpi=150)
    return paths


def policies(rows: Sequence[Row]) -> Any:
    """One map of layers and token classes for each policy."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = [row for row in rows if row.candidate.policy is not None]
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = _subplots(lines, columns, (11, 1.15 + 1.35 * lines))
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
    for axis in axes[-1]:
        axis.set_xlabel("layer", fontsize=9)
    handles = [Patch(facecolor=c, edgecolor="#888888", label=name) for name, c in CELLS]
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
    """Parallel sublayers and pairs are no matter of token classes: marks over the whole layer."""
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
    """A point for each candidate: right answers against times as fast as Hugging Face."""
    figure, axes = _subplots(2, 1, (10, 10.5))
    for axis, phase in zip(axes.flat, PHASES, strict=True):
        _scatter(axis, report.rows, phase)
    load = report.workload
    asked = report.rows[0].quality.questions.asked
    figure.suptitle(
        f"{asked} held-out questions; batch 1, {load.n_image} image and {load.n_text} text rows, "
        f"{load.n_new} new tokens",
        fontsize=11,
    )
    figure.get_layout_engine().set(rect=(0, 0.025, 1, 0.975), h_pad=0.12)
    return figure


def _scatter(axis: Any, rows: Sequence[Row], phase: Phase) -> None:
    """Names stand in a column at the right, each led to its point: points may lie together."""
    found = []
    for row in rows:
        score = row.quality.questions
        found.append((getattr(row, phase).vs_hf, 100 * score.share, score.interval, row))
    fastest = max(x for x, *_ in found)
    slowest = min(x for x, *_ in found)
    low = min(100 * interval[0] for *_, interval, _ in found)
    bottom, top = max(0.0, low - 3), 101.5
    span = fastest - slowest or 1.0
    names_at = fastest + 0.12 * span
    heights = np.linspace(top - 2, bottom + 2, len(found))
    colours = _colours(len(rows))
    by_height = sorted(found, key=lambda point: (-point[1], -point[0]))
    for height, (x, y, interval, row) in zip(heights, by_height, strict=True):
        colour = colours[list(rows).index(row)]
        error = [[y - 100 * interval[0]], [100 * interval[1] - y]]
        axis.errorbar(x, y, error, fmt="o", color=colour, markersize=8, elinewidth=1, alpha=0.9)
        axis.plot([x, names_at], [y, height], color=colour, lw=0.6, alpha=0.6)
        label = f"{row.candidate.label}  {x:.2f}x, {y:.0f} %"
        axis.text(names_at + 0.01 * span, height, label, color=colour, va="center", fontsize=9)
    axis.set_xlim(slowest - 0.08 * span, fastest + 0.75 * span)
    axis.set_ylim(bottom, top)
    axis.set_xticks([tick for tick in axis.get_xticks() if slowest - 0.1 <= tick <= names_at])
    axis.axvline(1.0, color="#999999", lw=0.8, ls=":")
    axis.set_xlabel("times as fast as Hugging Face", loc="left")
    axis.set_ylabel("right answers, %")
    axis.set_title(phase, loc="left", fontsize=12, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    dark = [colour for n, colour in enumerate(colormaps["tab20"].colors) if n % 2 == 0]
    return ["#000000", *(dark[n % len(dark)] for n in range(count - 1))]


def pictures(examples: Sequence[Example]) -> Any:
    """Pictures over their questions and the answers."""
    columns = min(3, len(examples))
    lines = -(-len(examples) // columns)
    figure, axes = _subplots(lines, columns, (11, 0.3 + 5.1 * lines))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, example in zip(axes.flat, examples, strict=False):
        axis.imshow(draw(example.scene), interpolation="nearest")
        axis.set_title(fill(example.question.text, 38), fontsize=11, fontweight="bold")
        truth = example.question.answer
        texts = [(f"truth: {truth}", "#1f4e79")]
        for label, answer in example.answers.items():
            mark, colour = ("✓", "#2a7f2a") if answer == truth else ("✗", "#c62828")
            texts.append((f"{mark} {label}: {answer or '(nothing)'}", colour))
        height = -0.03
        for text, colour in texts:
            wrapped = fill(text, 46, subsequent_indent="    ")
            axis.text(
                0, height, wrapped, transform=axis.transAxes, color=colour, fontsize=9, va="top"
            )
            height -= 0.065 * (1 + wrapped.count("\n"))
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    return figure


def _subplots(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
