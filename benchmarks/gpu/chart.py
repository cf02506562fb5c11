"""The end-to-end times of a results file as bars, beside the hardware's floors.

python -m benchmarks.gpu.chart benchmarks/results/<gpu> [--cell e2e.7b.b1 ...] [--png PATH]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results
from benchmarks.gpu.table import NOT_MEASURED, end_to_end_title

QUANTITIES = {"prefill": "a prompt, ms", "tpot": "a token, ms"}
PAPER, INK = "#d0d7de", "#1f6feb"


def plot(results: Results, cells: Sequence[str], path: Path) -> None:
    """Two panels per cell, prompts and tokens: each peer's time, with its floor inside the bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = results.lines()
    figure = Figure(figsize=(11, 3.2 * len(cells) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cells), 2, squeeze=False, sharey="row")
    for name, row in zip(cells, panels, strict=True):
        line, values = lines[name], lines[name].values
        about = f"{line.environment.get('device')}: {end_to_end_title(values)}"
        row[0].set_title(about, loc="left", fontsize=10)
        for axis, (quantity, label) in zip(row, QUANTITIES.items(), strict=True):
            _draw(axis, quantity, list(values["peers"].values()))
            axis.set_xlabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def _draw(axis: Any, quantity: str, peers: Sequence[dict[str, Any]]) -> None:
    places = range(len(peers))
    times = [own[f"{quantity}_ms"] or 0.0 for own in peers]  # none: nothing to show
    floors = [own.get(f"{quantity}_floor_ms") or 0.0 for own in peers]
    bars = axis.barh(places, times, color=PAPER, label="measured")
    axis.barh(places, floors, height=0.45, color=INK, label="floor: bytes and FLOPs of the plan")
    axis.bar_label(bars, [f"{time:.3g}" if time else "" for time in times], padding=3, fontsize=8)
    axis.set_yticks(places, [_label(own["label"]) for own in peers], fontsize=9)
    axis.set_ylim(len(peers) - 0.4, -0.6)  # the first one on top
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def _label(label: str) -> str:
    return label if label.startswith("Hugging Face") else f"fastskip, {label}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw a folder's results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.chart", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with a results.jsonl")
    parser.add_argument("--cell", action="append", help="default: all e2e.* cells that are done")
    parser.add_argument("--png", type=Path, help="default: end-to-end.png in the folder")
    options = parser.parse_args(arguments)
    results = Results(options.folder)
    done = [name for name, line in results.lines().items() if line.is_done]
    there = [name for name in done if name.startswith("e2e.")]
    cells = options.cell or there
    for name in cells:
        if name not in there:
            parser.error(f"--cell {name}: {NOT_MEASURED}; allowed: {', '.join(there) or 'none'}")
    if not cells:
        parser.error(f"{options.folder}: {NOT_MEASURED}; allowed: a folder with e2e.* cells")
    path = options.png or options.folder / "end-to-end.png"
    plot(results, cells, path)
    print(path)


if __name__ == "__main__":
    main()
