"""What `fastskip eval` prints."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastskip.commands.tables import number_table, show_table
from fastskip.wording import counted, significant

if TYPE_CHECKING:
    from fastskip.intervals import Estimate
    from fastskip.study.evaluation.items import Item
    from fastskip.study.evaluation.judging import Judgement
    from fastskip.wording import Scale


def show(
    found: Sequence["Judgement"], items: Sequence["Item"], new_tokens: int, *, by_kind: bool
) -> None:
    """Print the tables of all items and, `by_kind`, of each kind, then metrics over all answers.

    Scores on different scales are never mixed: each scale has its own table.
    """
    console = Console(highlight=False)
    first, *others = found[0].evaluation.parts
    show_table(console, _whole(found, first))
    for scale in others:
        show_table(console, _scores(found, scale))
    for scale in found[0].evaluation.parts if by_kind else ():
        show_table(console, _kinds(found, scale))
    _together(console, found, items)
    is_timed = found[0].speed is not None
    timed = f", times with {new_tokens} new tokens, batch 1" if is_timed else ""
    console.print(
        f"{counted(len(items), 'item')}, 95 % intervals, differences paired by item; agrees: share "
        f"of dense's tokens before the first that differs; FLOPs of the first item{timed}. Not "
        "told apart: these items show no difference."
    )


def _whole(found: Sequence["Judgement"], scale: "Scale") -> Table:
    """Scores on `scale`, and what covers all items: agreement, FLOPs, times."""
    dense = found[0]
    titles = [*_titles(found, scale), "agrees\nKL, nats", "FLOPs"]
    titles += ["TTFT\nms", "TPOT\nms"] if dense.speed is not None else []
    table = number_table(titles, 16)
    for each in found:
        tokens, divergence = each.agreement.means
        row = [
            *_scored(each, dense, scale),
            f"{tokens:.0%}\n{divergence:.2g}",
            f"{each.flops / dense.flops:.0%}",
        ]
        if each.speed is not None and dense.speed is not None:
            for own, base in (
                (each.speed.ttft_s, dense.speed.ttft_s),
                (each.speed.tpot_s, dense.speed.tpot_s),
            ):
                row.append(f"{significant(1e3 * own)}\n{base / own:.2f}x")
        table.add_row(*row)
    return table


def _scores(found: Sequence["Judgement"], scale: "Scale") -> Table:
    """Scores on `scale` only."""
    table = number_table(_titles(found, scale), 16)
    for each in found:
        table.add_row(*_scored(each, found[0], scale))
    return table


def _titles(found: Sequence["Judgement"], scale: "Scale") -> list[str]:
    parts = found[0].evaluation.parts
    items = f"\n{counted(len(parts[scale].judged), 'item')}" if len(parts) > 1 else ""
    return ["policy", f"{scale.heading}{items}", "from dense"]


def _scored(each: "Judgement", dense: "Judgement", scale: "Scale") -> list[str]:
    """A policy's name, its score, and its difference from dense with the verdict."""
    from fastskip.intervals import Verdict

    base = dense.evaluation.parts[scale]
    own = base if each is dense else each.evaluation.parts[scale]
    change = own.minus(base)
    verdict = "" if each is dense else Verdict.of(change).value
    told = "\n".join((*change.in_points, verdict))
    return [escape(each.label), _score(own.estimate(), scale), told]


def _kinds(found: Sequence["Judgement"], scale: "Scale") -> Table:
    dense = found[0].evaluation.parts[scale]
    counts = Counter(each.kind for each in dense.judged)
    table = number_table(["kind", "policy", f"{scale.heading}\n95 %", "from dense\n95 %"], 12)
    table.columns[1].justify = "left"
    for kind in dense.kinds:
        for each in found:
            own, is_dense = each.evaluation.parts[scale], each is found[0]
            name = f"{escape(kind)}, {counted(counts[kind], 'item')}" if is_dense else ""
            change = "" if is_dense else "\n".join(own.minus(dense, kind).in_points)
            table.add_row(name, escape(each.label), _score(own.estimate(kind), scale), change)
        table.add_section()
    return table


def _together(console: Console, found: Sequence["Judgement"], items: Sequence["Item"]) -> None:
    for each in found:
        label = escape(each.label)
        answers, captions = each.yes_no(items), each.captions(items)
        if answers is not None:
            console.print(
                f"{label}: yes/no accuracy {answers.accuracy:.1%}, F1 {answers.f1:.1%}, "
                f"precision {answers.precision:.1%}, recall {answers.recall:.1%}, said yes "
                f"{answers.said_yes:.0%}"
            )
        if captions is not None:
            bleu = ", ".join(f"{100 * score:.1f}" for score in captions.bleu)
            console.print(
                f"{label}: captions CIDEr {100 * captions.cider:.1f}, BLEU-1 to 4 {bleu}, "
                f"ROUGE-L {100 * captions.rouge_l:.1f}"
            )
        if each.empty:
            console.print(f"{label}: {each.empty} of {len(items)} answers are empty")


def _score(score: "Estimate", scale: "Scale") -> str:
    return f"{scale.text(score.mean)}\n{100 * score.low:.0f} to {100 * score.high:.0f}"
