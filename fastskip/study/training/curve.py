"""The loss curve of a run, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastskip.plotting import subplots


def write_curve(losses: Sequence[float], path: Path, title: str = "") -> None:
    """Plots the losses ``[steps]`` and their running mean over a twentieth of the steps."""
    width = max(1, len(losses) // 20)
    means = [
        sum(losses[max(0, end - width) : end]) / min(width, end)
        for end in range(1, len(losses) + 1)
    ]
    figure, ((axes,),) = subplots(1, 1, (7, 4))
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9dc3e6", linewidth=0.8, label="per step")
    axes.plot(steps, means, color="#1f4e79", linewidth=1.6, label=f"mean over {width}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss on answers")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
