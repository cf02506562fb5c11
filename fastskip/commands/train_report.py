"""What `fastskip train` reports at the end."""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from fastskip.commands.tables import new_table
from fastskip.wording import counted

if TYPE_CHECKING:
    from fastskip.study.training import Trained
    from fastskip.study.training.measuring import Comparison


def numbers(trained: "Trained", comparison: "Comparison | None") -> dict[str, Any]:
    found: dict[str, Any] = {
        "steps": len(trained.losses),
        "first_loss": trained.losses[0] if trained.losses else None,
        "last_loss": trained.losses[-1] if trained.losses else None,
        "seconds_per_step": trained.seconds_per_step,
        "rows_per_second": trained.rows_per_second,
        "broken": len(trained.broken),
    }
    if comparison is not None:
        found["seconds"] = {
            name: {"forward": times.forward, "backward": times.backward}
            for name, times in (("policy", comparison.policy), ("dense", comparison.dense))
        }
        found["speed_up"] = comparison.speed_up
    return found


def show(report: dict[str, Any], trained: "Trained", comparison: "Comparison | None") -> None:
    console = Console(highlight=False)
    if comparison is not None:
        table = new_table(["ms per batch", "forward", "backward", "both"])
        for name, times in (("dense", comparison.dense), ("under the policy", comparison.policy)):
            parts = (times.forward, times.backward, times.both)
            table.add_row(name, *(f"{1e3 * seconds:.1f}" for seconds in parts))
        console.print(table)
        console.print(
            f"The policy makes a step [bold]{comparison.speed_up:.2f} times[/] as fast as dense "
            f"training (medians of {counted(comparison.rounds, 'round')}, in turn)."
        )
    console.print(
        f"{counted(len(trained.losses), 'step')}, {trained.seconds_per_step:.3f} s each, "
        f"{trained.rows_per_second:.0f} rows/s; loss {report['first_loss']:.4f} -> "
        f"{report['last_loss']:.4f}."
        if trained.step_seconds
        else "No steps were left to do."
    )
    if "held_out_loss" in report:
        before, after = report["held_out_loss"].values()
        console.print(f"Held-out loss under the policy: {before:.4f} -> [bold]{after:.4f}[/].")
    if "skipped" in report:
        shares = dict(report["skipped"])
        overall = shares.pop(-1, 0.0)
        layers = ", ".join(f"{layer}: {share:.0%}" for layer, share in shares.items())
        console.print(f"Held-out rows that skip: [bold]{overall:.1%}[/] (by layer: {layers}).")
    if trained.broken:
        verb = "was" if len(trained.broken) == 1 else "were"
        told = f"{counted(len(trained.broken), 'row')} {verb} left out"
        console.print(f"[yellow]{told}[/]; the first ones:")
        for line in trained.broken[:3]:
            console.print(f"  {line}", markup=False)
