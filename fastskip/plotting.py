"""What all plots share: the check for matplotlib, figures without pyplot, plain axes, PNG files."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class PlotsError(ImportError):
    """Plots are needed but cannot be drawn."""


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require(what: str, extra: str = "plots") -> None:
    """Raise `PlotsError` without matplotlib; to be called before anything is measured.

    `what`: what needs it; `extra`: the optional dependencies of fastskip that include it.
    """
    if not is_available():
        raise PlotsError(
            f"{what}: matplotlib is missing; install it with: pip install 'fastskip[{extra}]'"
        )


def subplots(lines: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """Figure and axes, created without pyplot, which would keep figures open."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def settled(figure: Any) -> Any:
    """The figure with its layout computed and frozen, so that all files get the same one."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def plain(axis: Any) -> None:
    """No frame at the top and on the right, and a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.6)


def save(figures: Mapping[str, Any], folder: Path, dpi: int) -> list[Path]:
    """Write figures as NAME.png into an existing folder; returns their paths."""
    paths = {folder / f"{name}.png": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        figure.savefig(path, dpi=dpi)
    return list(paths)
