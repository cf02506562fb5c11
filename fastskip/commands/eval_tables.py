"""What `fastskip eval` prints of judgements."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastskip.intervals import Estimate
    from fastskip.study.items import Item
    from fastskip.study.judging import Judgement


def show(
    found: Sequence["Judgement"], items: Sequence["Item"], new_tokens: int, *, by_kind: bool
) -> None:
    """The table of all items, of each kind where that is wanted, and what holds of some metrics."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_whole(found))
    if by_kind:
        console.print(_kinds(found, items))
    _together(console, found, items)
    is_timed = found[0].speed is not None
    timed = f", times with {new_tokens} new tokens, batch 1" if is_timed else ""
    console.print(
        f"{len(items)} items, 95 % intervals, differences item by item; agrees: tokens as dense, "
        f"up to the first that differs; FLOPs of the first item{timed}. Not told apart: these "
        "items show no difference."
    )


def _whole(found: Sequence["Judgement"]) -> "Table":
    from fastskip.study.judging import Verdict

    dense = found[0]
    titles = ["policy", "score", "from dense", "agrees\nKL, nats", "FLOPs"]
    titles += ["TTFT\nms", "TPOT\nms"] if dense.speed is not None else []
    table = _table(titles)
    for each in found:
        change = each.change(dense)
        tokens, divergence = each.agreement.means
        verdict = "" if each is dense else Verdict.of(change).value
        row = [
            each.label,
            _score(each.evaluation.estimate()),
            f"{_change(change)}\n{verdict}",
            f"{tokens:.0%}\n{divergence:.2g}",
            f"{each.flops / dense.flops:.0%}",
        ]
        if each.speed is not None and dense.speed is not None:
            for own, base in (
                (each.speed.ttft_s, dense.speed.ttft_s),
                (each.speed.tpot_s, dense.speed.tpot_s),
            ):
                row.append(f"{1e3 * own:.3g}\n{base / own:.2f}x")
        table.add_row(*row)
    return table


def _kinds(found: Sequence["Judgement"], items: Sequence["Item"]) -> "Table":
    dense, counts = found[0], Counter(item.kind for item in items)
    table = _table(["kind", "policy", "score", "95 %", "from dense", "95 %"])
    for kind in dense.evaluation.kinds:
        for each in found:
            name = ""
            if each is dense:
                name = f"{kind}, {counts[kind]} item{'s' * (counts[kind] > 1)}"
            score, change = each.evaluation.estimate(kind), ["", ""]
            if each is not dense:
                change = _change(each.evaluation.minus(dense.evaluation, kind)).split("\n")
            table.add_row(name, each.label, *_score(score).split("\n"), *change)
        table.add_section()
    return table


def _together(console: "Console", found: Sequence["Judgement"], items: Sequence["Item"]) -> None:
    for each in found:
        answers, captions = each.yes_no(items), each.captions(items)
        if answers is not None:
            console.print(
                f"{each.label}: yes/no accuracy {answers.accuracy:.1%}, F1 {answers.f1:.1%}, "
                f"precision {answers.precision:.1%}, recall {answers.recall:.1%}, said yes "
                f"{answers.said_yes:.0%}"
            )
        if captions is not None:
            bleu = ", ".join(f"{100 * score:.1f}" for score in captions.bleu)
            console.print(
                f"{each.label}: captions CIDEr {100 * captions.cider:.1f}, BLEU-1 to 4 {bleu}, "
                f"ROUGE-L {100 * captions.rouge_l:.1f}"
            )
        if each.empty:
            console.print(f"{each.label}: {each.empty} of {len(items)} answers are empty")


def _table(titles: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].overflow, table.columns[0].min_width = "fold", 16
    for title, column in zip(titles[1:], table.columns[1:], strict=True):
        column.justify, column.no_wrap = "left" if title == "policy" else "right", True
    return table


def _score(score: "Estimate") -> str:
    return f"{score.mean:.1%}\n{100 * score.low:.0f} to {100 * score.high:.0f}"


def _change(change: "Estimate") -> str:
    return f"{100 * change.mean:+.1f}\n{100 * change.low:+.1f} to {100 * change.high:+.1f}"
