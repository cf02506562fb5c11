"""What `fastskip search` found, as a table in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from fastskip.commands.tables import number_table, show_table
from fastskip.wording import significant

if TYPE_CHECKING:
    from fastskip.study.search import SearchResult


def show(result: "SearchResult") -> None:
    """Print every candidate with its numbers, what was left out, and the conclusion."""
    from fastskip.study.search import Quantity

    console = Console(highlight=False)
    dense = next(each for each in result.candidates if each.source == "dense")
    quantity = Quantity(result.budget["quantity"])
    titles = ["candidate", "FLOPs", "TTFT", "TPOT", "KL", result.scale.heading, "from dense"]
    table = number_table(titles, 18)
    for each in sorted(result.candidates, key=lambda one: -one.score.mean):
        marks = ("[green]>[/] " if each.is_recommended else "") + escape(each.name)
        marks += " *" if each.is_on_front else ""
        times = []
        for own, base in ((each.ttft_s, dense.ttft_s), (each.tpot_s, dense.tpot_s)):
            times.append("" if own is None or base is None else f"{base / own:.2f}x")
        table.add_row(
            marks if each.keeps_budget or each.source == "dense" else f"[dim]{marks}[/]",
            f"{each.flops:.0%}",
            *times,
            f"{each.calibration_kl:.3g}",
            result.scale.text(each.score.mean),
            "\n".join(each.change.in_points),
        )
    show_table(console, table)
    workload, settings = result.workload, result.settings
    console.print(
        f"* nothing beats it in both score and {quantity.label}; dim: over the budget "
        f"({result.budget['text']}). KL: nats per answer token on {settings['calibration_items']} "
        f"calibration items; scores: {settings['held_out_items']} held-out items, paired 95 % "
        f"intervals. Dense: TTFT {_ms(dense.ttft_s)}, TPOT {_ms(dense.tpot_s)}, batch 1, "
        f"{workload['n_image']} image and {workload['n_text']} text rows, {workload['n_new']} new "
        "tokens."
    )
    if result.left_out:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in result.left_out)
        console.print(f"[dim]Left out: {escape(reasons)}.[/]")
    if result.latency is not None:
        errors = result.latency["errors"]
        console.print(
            f"Times are predicted by a least-squares fit to what {result.latency['probes']} "
            f"policies saved here; its RMS error is {errors['prefill']:.1%} of TTFT and "
            f"{errors['decode']:.1%} of TPOT."
        )
    if result.settings["is_cut_short"]:
        console.print("[yellow]--minutes ended the search early.[/]")
    console.print(f"[bold]{escape(result.text)}[/]")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{significant(1e3 * seconds)} ms"
