"""A search in two figures: score against cost, and the cost of every change in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastskip.plot_labels import Label, place
from fastskip.plotting import plain, save, subplots
from fastskip.study.search.budget import Quantity
from fastskip.study.search.result import Found, SearchResult

COLOURS = {
    "search": "#c62828",
    "peer": "#1f4e79",
    "uniform": "#e0a03c",
    "random": "#999999",
    "router": "#2a7f2a",
    "dense": "#000000",
}
MARKERS = {"search": "*", "peer": "o", "uniform": "s", "random": "x", "router": "^", "dense": "D"}


def write(result: SearchResult, folder: Path) -> list[Path]:
    """Write both figures; returns their paths."""
    return save({"front": front(result), "sensitivity": sensitivity(result)}, folder, dpi=120)


def front(result: SearchResult) -> Any:
    """Held-out score against cost in the budget's quantity, with 95 % intervals."""
    figure, ((axis,),) = subplots(1, 1, (9, 5.4))
    quantity = Quantity(result.budget["quantity"])
    name = quantity.seconds
    dense = next(each for each in result.candidates if each.source == "dense")

    def cost(each: Found) -> float:
        taken = None if name is None else getattr(each, name)
        return 100 * (each.cost if taken is None else taken / getattr(dense, name or ""))

    for source, colour in COLOURS.items():
        own = [each for each in result.candidates if each.source == source]
        if not own:
            continue
        x, y = [cost(each) for each in own], [100 * each.score.mean for each in own]
        axis.vlines(
            x,
            [100 * each.score.low for each in own],
            [100 * each.score.high for each in own],
            color=colour,
            lw=1,
            alpha=0.4,
        )
        size = 130 if source == "search" else 36
        axis.scatter(x, y, color=colour, marker=MARKERS[source], s=size, label=source, zorder=3)
    best = sorted((each for each in result.candidates if each.is_on_front), key=cost)
    axis.plot(
        [cost(each) for each in best],
        [100 * each.score.mean for each in best],
        color="#555555",
        lw=1,
        ls=":",
        zorder=1,
    )
    axis.set_xlabel(f"{quantity.label}, % of dense" + ("" if name is None else " (measured)"))
    axis.set_ylabel(f"held-out items: {result.scale.axis} (95 % intervals)")
    axis.set_title(f"{result.budget['text']} (dotted: Pareto front)", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")
    plain(axis)
    labels = [_label(each, cost(each)) for each in _named(result.candidates)]
    place(axis, labels, size=7)
    return figure


def _label(each: Found, cost: float) -> Label:
    upright = 100 * each.score.low, 100 * each.score.high
    return Label(
        each.name, cost, 100 * each.score.mean, upright, (cost, cost), COLOURS[each.source]
    )


def sensitivity(result: SearchResult) -> Any:
    """A heat map of layers and changes: how far the answers move, darker for further."""
    from matplotlib.colors import LogNorm

    labels = [
        x.label() for x in sorted({x.change for x in result.sensitivity}, key=lambda x: x.key)
    ]
    depth = 1 + max(each.layer for each in result.sensitivity)
    table = [[float("nan")] * depth for _ in labels]
    for each in result.sensitivity:
        table[labels.index(each.change.label())][each.layer] = max(each.kl, 1e-5)
    figure, ((axis,),) = subplots(1, 1, (2.8 + 0.42 * depth, 1.4 + 0.24 * len(labels)))
    image = axis.imshow(table, aspect="auto", cmap="magma_r", norm=LogNorm(1e-4, 10))
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_xticks(range(0, depth, max(1, depth // 16)))
    axis.set_xlabel("layer (of a pair, the first one)")
    axis.set_title("how far each change moves answers", fontsize=10)
    figure.colorbar(image, ax=axis, label="KL, nats per answer token", shrink=0.8)
    return figure


def _named(candidates: Sequence[Found]) -> list[Found]:
    """The candidates to label: the search's own and peers, unless they score very low."""
    shown = [each for each in candidates if each.source in ("search", "peer")]
    return [each for each in shown if each.score.mean > 0.25]
