"""The demo's pictures and tables for the terminal."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from rich import box
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from fastskip.demo.results import Example, Report, Score, Speed
from fastskip.demo.scenes import GRID, Scene, draw

SIDE = 24
"""Characters per line of a picture; each is two pixels high."""
GAP = 3
MARKS = {"circle": "●", "square": "■", "triangle": "▲", "cross": "✚"}


def picture(scene: Scene) -> Text:
    """The scene in upper half blocks: the foreground is one pixel, the background that below."""
    small = draw(scene).resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small).reshape(SIDE // 2, 2, SIDE, 3).tolist()
    text = Text(no_wrap=True)
    for upper, lower in pixels:
        for above, below in zip(upper, lower, strict=True):
            text.append("▀", Style(color=_hex(above), bgcolor=_hex(below)))
        text.append("\n")
    return text


def sketch(scene: Scene) -> Text:
    """The scene for terminals without colours: figures as marks, colours as their first letters."""
    cells = [["  ·   "] * GRID for _ in range(GRID)]
    for figure in scene.figures:
        cells[figure.row][figure.column] = f"{figure.colour[:3]} {MARKS[figure.shape]} "[:6]
    lines = ("".join(cell.rjust(SIDE // GRID) for cell in row) for row in cells)
    return Text("\n".join(lines) + "\n", no_wrap=True)


def gallery(examples: Sequence[Example], width: int, coloured: bool) -> Table:
    """Pictures side by side, as many as fit, each over its question and the answers."""
    columns = max(1, min(len(examples), (width + GAP) // (SIDE + GAP)))
    grid = Table.grid(*["" for _ in range(columns)], padding=(0, GAP, 1, 0), pad_edge=False)
    for column in grid.columns:
        column.width = SIDE
    cards = [_card(example, coloured) for example in examples]
    for first in range(0, len(cards), columns):
        grid.add_row(*cards[first : first + columns])
    return grid


def _card(example: Example, coloured: bool) -> Group:
    truth = example.question.answer
    lines = [Text(example.question.text, style="bold"), Text(f"truth: {truth}", style="cyan")]
    for label, answer in example.answers.items():
        if answer == truth:
            lines.append(Text(f"✓ {label}", "green"))
        else:
            lines.append(Text(f"✗ {label}: {answer or '(nothing)'}", "red"))
    return Group(picture(example.scene) if coloured else sketch(example.scene), *lines)


def summary(report: Report) -> Table:
    """Each candidate's accuracy, and its speed relative to Hugging Face."""
    table = _table("Accuracy (95 % interval) and speed")
    for name in ("  questions, %", "  captions, %", "prefill\nvs HF", "decode\nvs HF"):
        table.add_column(name, justify="right")
    for row in report.rows:
        quality = row.quality
        table.add_row(
            row.candidate.label,
            percent(quality.questions),
            percent(quality.captions),
            f"{row.prefill.vs_hf:.2f}x",
            f"{row.decode.vs_hf:.2f}x",
        )
    return table


def closeness(report: Report) -> Table:
    """How close each policy comes to its ideal gain over our own dense model."""
    table = _table("Gain over fastskip's dense model, and ideal gain")
    for phase in ("prefill", "decode"):
        for name in (f"{phase}\nms", "vs\ndense", "ideal", "share"):
            table.add_column(name, justify="right")
    for row in report.rows:
        table.add_row(row.candidate.label, *_cells(row.prefill), *_cells(row.decode))
    return table


def notes(report: Report) -> Text:
    """What the tables mean."""
    load = report.workload
    asked, same = report.rows[0].quality, report.agreement
    rounds = len(report.rows[0].prefill.timing.samples)
    lines = (
        f"Accuracy: exact match of greedy answers to {asked.questions.asked} questions and "
        f"{asked.captions.asked} captions about held-out scenes. Dense gives Hugging Face's answer "
        f"to {same.right} of {same.asked}.",
        f"Speed: batch 1, {load.n_image} image and {load.n_text} text rows, {load.n_new} new "
        f"tokens; medians of {rounds} interleaved rounds on {_threads(report)}. "
        "Prefill: decoder and lm_head over the prompt, without the vision tower; decode: one "
        "token. HF: Hugging Face's default.",
        "Ideal: the gain in floor time, which is what the plan's bytes or FLOPs take at this "
        "machine's measured ceilings. In a model this small, launches rather than work take much "
        "of the time, so shares of the ideal stay below a large model's. Parallel blocks and pairs "
        "save launches, which floors do not count, and have no ideal.",
        report.footer,
    )
    return Text("\n".join(lines), style="dim")


def _threads(report: Report) -> str:
    """Thread counts that are hopeless on a busy machine have been left out."""
    one, *others = report.ceilings
    if others:
        return f"the better of {one} and {others[0]} threads"
    return f"{one} thread" + "s" * (one > 1)


def _table(title: str) -> Table:
    """Narrow enough for 80 columns; names never wrap."""
    table = Table(box=box.SIMPLE_HEAD, title=title, padding=0)
    table.add_column("", no_wrap=True)
    return table


def percent(score: Score) -> str:
    """A share with its interval: 97 (95-99)."""
    low, high = score.interval
    return f"{100 * score.share:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def _cells(speed: Speed) -> tuple[str, ...]:
    share = speed.share_of_ideal
    return (
        f"{1e3 * speed.timing.seconds:.1f}",
        f"{speed.vs_dense:.2f}",
        "-" if speed.ideal is None else f"{speed.ideal:.2f}",
        "-" if share is None else f"{share:.2f}",
    )


def _hex(rgb: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
