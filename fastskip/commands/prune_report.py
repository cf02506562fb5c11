"""What `fastskip prune` prints: how many weights became zero, layer by layer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fastskip.commands.tables import new_table


@dataclass(frozen=True)
class Zeros:
    """Zero weights by matrix, before and now: masks also remove weights that were zero before."""

    before: Mapping[str, int]
    now: Mapping[str, int]
    weights: Mapping[str, int]

    def shares(self, names: Collection[str]) -> dict[str, float]:
        """For these matrices: the share that became zero, and the share that is zero now."""
        before, now, weights = (
            sum(own[name] for name in names) for own in (self.before, self.now, self.weights)
        )
        return {
            "removed": round((now - before) / weights, 6) if weights else 0.0,
            "zero": round(now / weights, 6) if weights else 0.0,
        }

    def by_layer(self) -> list[dict[str, Any]]:
        names: dict[int, list[str]] = {}
        for name in self.weights:
            names.setdefault(int(name.split(".")[1]), []).append(name)
        return [
            {
                "layer": layer,
                "matrices": len(own),
                "weights": sum(self.weights[name] for name in own),
                **self.shares(own),
            }
            for layer, own in sorted(names.items())
        ]


def show(zeros: Zeros, target: str) -> None:
    """Print a table of layers and the total; `target`: the share of each layer that was to go."""
    console = Console(highlight=False)
    titles = ("layer", "matrices", "weights", "target", "removed", "zero now")
    table = new_table(titles, texts=0)
    for own in zeros.by_layer():
        numbers = (str(own["layer"]), str(own["matrices"]), f"{own['weights']:,}")
        table.add_row(*numbers, target, f"{own['removed']:.2%}", f"{own['zero']:.2%}")
    console.print(table)
    total = zeros.shares(zeros.weights)
    before = f" ({total['zero'] - total['removed']:.2%} were zero before)"
    console.print(
        f"[bold]{total['zero']:.2%}[/] of these weights are zero now"
        f"{before if total['zero'] > total['removed'] else ''}."
    )
