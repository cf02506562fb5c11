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
"""Columns of a picture; a character is two pixels high."""
GAP = 3
MARKS = {"circle": "●", "square": "■", "triangle": "▲", "cross": "✚"}


def picture(scene: Scene) -> Text:
    """The scene in upper half blocks: the foreground is one pixel, the background the next."""
    small = draw(scene).resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small).reshape(SIDE // 2, 2, SIDE, 3).tolist()
    text = Text(no_wrap=True)
    for upper, lower in pixels:
        for above, below in zip(upper, lower, strict=True):
            text.append("▀", Style(color=_hex(above), bgcolor=_hex(below)))
        text.append("\n")
    return text


def sketch(scene: Scene) -> Text:
    """The scene without colours: a mark for each figure, with the first letters of its colour."""
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
    """What each candidate keeps, and how many times as fast as Hugging Face it is."""
    table = _table("Right answers (95 % interval) and speed")
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
    """How near each policy comes to what it could gain over our own dense model."""
    table = _table("Gain over our own dense model, and the ideal")
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
        f"Answers: {asked.questions.asked} questions and {asked.captions.asked} captions about "
        "scenes that were not trained on, greedy, exact match. Dense gives Hugging Face's answer "
        f"to {same.right} of {same.asked}.",
        f"Speed: batch 1, {load.n_image} image and {load.n_text} text rows, {load.n_new} new "
        f"tokens; medians of {rounds} rounds, everyone in turn, on {_threads(report)}. "
        "Prefill: decoder and lm_head over the prompt, without the vision tower; decode: one "
        "token. HF: Hugging Face's default.",
        "Ideal: the gain in floor time, where each operation takes the bytes or FLOPs that the "
        "plan says at this machine's measured ceilings. At this model's size much of the time is "
        "not work but launches, so that shares stay below what a large model reaches. "
        "Parallel blocks and pairs save launches, for which there is no floor: no ideal.",
        report.footer,
    )
    return Text("\n".join(lines), style="dim")


def _threads(report: Report) -> str:
    """Numbers of threads that are hopeless on a busy machine were left out."""
    one, *others = report.ceilings
    if others:
        return f"the better of {one} and {others[0]} threads"
    return f"{one} thread" + "s" * (one > 1)


def _table(title: str) -> Table:
    """Narrow enough for 80 columns; names are never broken."""
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
