"""The report in Markdown, written beside its figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastskip.study.paper import figures, tables
from fastskip.study.paper.experiments import Section
from fastskip.study.paper.findings import findings
from fastskip.study.paper.results import Results, Row, Score

RESULTS = "results.json"
REPORT = "report.md"


def bundled_folder() -> Path:
    """The results that ship with the package."""
    return Path(__file__).parent / "results"


def write(results: Results, folder: Path) -> list[Path]:
    """Write JSON, CSV, figures and report to a folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / RESULTS)
    # read back, so that the report cannot say anything that the JSON does not
    read = Results.load(folder / RESULTS)
    drawn = figures.write(read, folder)
    written = tables.write(read, folder)
    (folder / REPORT).write_text(markdown(read, [path.stem for path in drawn]), encoding="utf-8")
    return [folder / REPORT, folder / RESULTS, *written, *drawn]


def markdown(results: Results, drawn: Sequence[str] = ()) -> str:
    """The report; `drawn`: names of the figures beside it."""
    parts = [
        "# Skipping computations in multimodal LLMs, in miniature",
        _introduction(results),
        "## What agrees with the papers, and what does not",
        _findings(results),
        "## 1. Score against skipped compute",
        _figure("skipping", drawn),
        _table(results.of(Section.SKIPPING)),
        "## 2. Parallel attention and FFN, and block pairs",
        "Nothing is skipped here except rows of a last pair that are never read; the gain is "
        "fewer sequential steps.",
        _figure("parallel", drawn),
        _table(results.of(Section.PARALLEL)),
        "## 3. Training with half of the blocks skipped, or 70 % of the weights removed",
        _training(results),
        _figure("training", drawn),
        _table(results.of(Section.TRAINING), results),
        "## 4. Smaller models at equal compute",
        _figure("smaller", drawn),
        _table([row for row in results.rows if row.section in (Section.DENSE, Section.SMALLER)]),
        _speeds(results),
        "## 5. Similarity from layer to layer",
        "Cosine between input and output of a block, its attention and its FFN, in the dense large "
        "model, over prompts and the model's own answers.",
        _figure("similarity", drawn),
        "## How it was measured",
        _conditions(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Results) -> str:
    missing = "" if results.is_whole else " **Some cells are still missing.**"
    return (
        'The experiments of "Skipping Computations in Multimodal LLMs" (arXiv 2410.09454) on the '
        "demo's small LLaVA, whose pictures are generated scenes of coloured shapes. It is a small "
        "synthetic task: the language model has 8 layers and 3.9 M weights and was trained on this "
        "task only, for part of the training with randomly skipped sublayers for image rows from "
        "layer 3 on. Agreement is encouraging; disagreement is no refutation. The papers' own "
        "numbers are not reproduced." + missing
    )


def _findings(results: Results) -> str:
    lines = ["| claim | here | measured |", "|---|---|---|"]
    lines += [f"| {f.claim} | **{f.verdict.value}** | {f.evidence} |" for f in findings(results)]
    rules = (
        "The thresholds were chosen after seeing the bundled results, so read the numbers rather "
        "than the verdicts. The 97 % apply to the mean of both scores, not to each, except in the "
        "first claim. Questions and captions are compared by exact match, which is stricter on "
        "captions than F1. Late and early starts are compared at equal compute. The longer "
        'training runs were added after the shorter ones had fallen short. The "equal" compute of '
        "the smaller model is only the closest match available."
    )
    return "\n".join(lines) + "\n\n" + rules


def _training(results: Results) -> str:
    return (
        f"Each step trains on {results.effort['sequences']} conversations about training pictures, "
        "with AdamW, under the same policy or mask that is evaluated; in all, a small fraction of "
        "the dense model's training data. Projector: the language model stays frozen, as in the "
        "paper. Language: projector and language model. In the paper's code, "
        '"half of the blocks" means every second block except the first and the last: 15 of 32, '
        "here 3 of 8; the exact half is layers 1, 3, 5 and 7. Wanda removes weights row by row, "
        "calibrated on training pictures. Compute still counts removed weights."
    )


def _table(rows: Iterable[Row], trained_in: Results | None = None) -> str:
    """Rows with their scores; `trained_in`: the results from which to show training steps."""
    rows = list(rows)
    if not rows:
        return "Not part of this run."
    head = [
        "model",
        *([] if trained_in is None else ["trained", "steps"]),
        "compute of a question / caption",
        "questions",
        "kept",
        "captions, F1",
        "kept",
        "whole captions",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row.label,
            *([] if trained_in is None else [row.learned.value, str(trained_in.steps(row))]),
            f"{row.question_compute:.0%} / {row.caption_compute:.0%}",
            *_score_cells(row.questions),
            *_score_cells(row.captions),
            f"{row.whole_captions.score.mean:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _score_cells(score: Score) -> tuple[str, str]:
    """The score with its interval, and the share kept with its spread."""
    interval = f"{score.score.mean:.1%} ({100 * score.score.low:.0f}-{100 * score.score.high:.0f})"
    kept = f"{score.kept:.1%}"
    return interval, kept if score.spread is None else f"{kept} ± {100 * score.spread:.1f}"


def _speeds(results: Results) -> str:
    if not results.speeds:
        return ""
    lines = [
        "Median times for one caption, batch 1, on the machine below; at this size they are mostly "
        "overhead, so the comparison is by compute.",
        "",
        "| model | TTFT, ms | TPOT, ms | cache, kB | MFLOP |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.label} | {1e3 * each.ttft_s:.1f} | {1e3 * each.tpot_s:.2f} | "
        f"{each.kv_bytes / 1e3:.0f} | {each.flops / 1e6:.0f} |"
        for each in results.speeds
    ]
    return "\n".join(lines)


def _conditions(results: Results) -> str:
    found, effort = results.environment, results.effort
    return (
        f"{len(results.seeds)} seeds, each with its own {effort['questions']} questions and "
        f"{effort['captions']} captions about held-out pictures, and its own training pictures. "
        "Questions are scored by exact match, captions by the F1 of the figures named; a whole "
        "caption names all of them and no others. "
        "Scores pool all seeds, with 95 % bootstrap intervals over items; as several questions may "
        "share a picture, the intervals are somewhat too narrow. Kept: the share of the dense "
        "large model's score on the same items, with the standard deviation between seeds; without "
        "training, seeds differ only in their items. The bundled models were trained with a single "
        "seed. Compute: FLOPs of decoder and lm_head for a typical item, from the plan, as a share "
        "of the dense large model's. "
        f"All cells together took {results.seconds / 60:.0f} minutes of CPU time: "
        f"{found['processor']}, {found['dtype']} on {found['device']}, torch "
        f"{found['torch']}, transformers {found['transformers']}, Python {found['python']}."
    )


def _figure(name: str, drawn: Sequence[str]) -> str:
    return f"![{name}]({name}.png)" if name in drawn else ""
