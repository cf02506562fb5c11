"""The report's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastskip.plotting import plain, save, subplots
from fastskip.policy import TokenClass
from fastskip.study.paper.experiments import Part, Scope, Section
from fastskip.study.paper.results import Results, Row, Score

COLOURS = {
    Scope.ALL: "#1f4e79",
    Scope.PROMPT: "#e0a03c",
    Scope.GENERATED: "#2a7f2a",
    Scope.IMAGE: "#c62828",
}
MARKERS = {Scope.ALL: "o", Scope.PROMPT: "s", Scope.GENERATED: "^", Scope.IMAGE: "D"}
CLASS_COLOURS = {
    TokenClass.IMAGE: "#c62828",
    TokenClass.TEXT: "#1f4e79",
    TokenClass.GENERATED: "#2a7f2a",
}
KEPT_LINE = 97


def write(results: Results, folder: Path) -> list[Path]:
    """Write every figure for which there are results; returns their paths."""
    figures = {
        "skipping": skipping(results) if results.of(Section.SKIPPING) else None,
        "parallel": parallel(results) if results.of(Section.PARALLEL) else None,
        "training": training(results) if results.of(Section.TRAINING) else None,
        "smaller": smaller(results),
        "similarity": similarity(results) if results.similarity else None,
    }
    return save({name: each for name, each in figures.items() if each is not None}, folder, dpi=100)


def skipping(results: Results) -> Any:
    """Share of the dense score against skipped compute; columns: parts, rows: kinds of items."""
    figure, axes = subplots(2, len(Part), (11, 6.4), sharey="row")
    for column, part in enumerate(Part):
        for line in (0, 1):
            axis = axes[line, column]
            for scope in Scope:
                rows = [
                    row
                    for row in results.of(Section.SKIPPING)
                    if row.schedule is not None
                    and (row.schedule.part, row.schedule.scope) == (part, scope)
                ]
                points = sorted((_left_out(row, line), *_kept(_judged(row, line))) for row in rows)
                if points:
                    x, y, spread = zip(*points, strict=True)
                    style = {"color": COLOURS[scope], "label": scope.value, "capsize": 2, "lw": 1}
                    axis.errorbar(x, y, yerr=spread, fmt=MARKERS[scope], markersize=5, **style)
            axis.axhline(KEPT_LINE, color="#999999", lw=0.8, ls=":")
            axis.set_title(f"{part.label}: {('questions', 'captions')[line]}", fontsize=10)
            plain(axis)
    for axis in axes[-1]:
        axis.set_xlabel("compute left out, %")
    for axis in axes[:, 0]:
        axis.set_ylabel("dense score kept, %")
    axes[0, 0].legend(title="tokens", fontsize=8)
    return figure


def parallel(results: Results) -> Any:
    """Share of the dense score of every arrangement."""
    return _bars(results.of(Section.PARALLEL), [row.label for row in results.of(Section.PARALLEL)])


def training(results: Results) -> Any:
    """Share of the dense score without and with training."""
    rows = results.of(Section.TRAINING)
    labels = [
        f"{row.label}: {row.learned.value} trained, {results.steps(row)} steps"
        if results.steps(row)
        else f"{row.label}: untrained"
        for row in rows
    ]
    return _bars(rows, labels)


def smaller(results: Results) -> Any:
    """Scores against compute: models of three sizes, and the large one with blocks skipped."""
    figure, axes = subplots(1, 2, (11, 4.2), sharey=True)
    groups: dict[str, tuple[list[Row], str]] = {
        "models of three sizes": (
            [r for r in results.rows if r.section in (Section.DENSE, Section.SMALLER)],
            "#000000",
        ),
        "large model, blocks left out (all tokens)": (
            [
                r
                for r in results.of(Section.SKIPPING)
                if r.schedule is not None
                and (r.schedule.part, r.schedule.scope) == (Part.BLOCK, Scope.ALL)
            ]
            + [r for r in results.of(Section.TRAINING) if _is_left_out(r, "nothing")],
            COLOURS[Scope.ALL],
        ),
        "the same, language model trained": (
            [r for r in results.of(Section.TRAINING) if _is_left_out(r, "language")],
            COLOURS[Scope.PROMPT],
        ),
    }
    for line, axis in enumerate(axes.flat):
        for label, (rows, colour) in groups.items():
            rows = sorted(rows, key=lambda row: _compute(row, line))
            x = [100 * _compute(row, line) for row in rows]
            y = [100 * _judged(row, line).score.mean for row in rows]
            low = [100 * _judged(row, line).score.low for row in rows]
            high = [100 * _judged(row, line).score.high for row in rows]
            axis.vlines(x, low, high, color=colour, lw=1, alpha=0.5)
            # only the three sizes form a curve: policies of equal compute may skip different parts
            form = "o-" if colour == "#000000" else "o"
            if rows:
                axis.plot(x, y, form, color=colour, label=label, markersize=5, lw=1)
        axis.set_title(("questions", "captions")[line], fontsize=10)
        axis.set_xlabel("compute, % of the dense large model's")
        axis.set_xscale("log")
        plain(axis)
    axes[0, 0].set_ylabel("score, % (95 % intervals)")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    return figure


def similarity(results: Results) -> Any:
    """Cosines between input and output of blocks, attention and FFNs, by class."""
    figure, axes = subplots(1, 3, (11, 3.6), sharey=True)
    for axis, part in zip(axes.flat, Part, strict=True):
        for token_class, colour in CLASS_COLOURS.items():
            own = [each for each in results.similarity if each.token_class is token_class]
            x = [each.layer for each in own]
            y = [getattr(each, part.value) for each in own]
            axis.plot(x, y, "o-", color=colour, label=token_class.value, markersize=4, lw=1)
        axis.set_title(part.label, fontsize=10)
        axis.set_xlabel("layer")
        plain(axis)
    axes[0, 0].set_ylabel("cosine of input and output")
    axes[0, 0].legend(fontsize=8)
    return figure


def _bars(rows: Sequence[Row], labels: Sequence[str]) -> Any:
    figure, axes = subplots(1, 1, (11, 0.8 + 0.42 * len(rows)))
    axis = axes[0, 0]
    for line, (name, colour) in enumerate((("questions", "#1f4e79"), ("captions", "#e0a03c"))):
        places = [number + (0.2 if line else -0.2) for number in range(len(rows))]
        kept = [_kept(_judged(row, line)) for row in rows]
        spread = [each[1] for each in kept]
        axis.barh(places, [each[0] for each in kept], 0.36, xerr=spread, color=colour, label=name)
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.axvline(KEPT_LINE, color="#555555", lw=0.8, ls=":")
    axis.set_xlabel("dense score kept, % (bars: standard deviation between seeds)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axis)
    return figure


def _is_left_out(row: Row, learned: str) -> bool:
    return row.learned == learned and not row.removed and row.question_compute < 1


def _left_out(row: Row, line: int) -> float:
    return 100 * (1 - _compute(row, line))


def _compute(row: Row, line: int) -> float:
    return row.caption_compute if line else row.question_compute


def _judged(row: Row, line: int) -> Score:
    return row.captions if line else row.questions


def _kept(score: Score) -> tuple[float, float]:
    return 100 * score.kept, 100 * (score.spread or 0.0)
