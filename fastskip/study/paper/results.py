"""The results as data, stored as JSON; report, figures, tables and findings all read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from fastskip.intervals import Estimate, bootstrap, paired_bootstrap
from fastskip.json_file import write_json
from fastskip.study.evaluation.answers import Evaluation
from fastskip.study.paper.experiments import Cell, Learned, Part, Schedule, Scope, Section
from fastskip.study.similarity import LayerSimilarity

SCHEMA_VERSION = 1


class ResultsError(ValueError):
    """Results that cannot be read; names the file and what is allowed."""


@dataclass(frozen=True, slots=True)
class Score:
    """The mean score of one cell on one kind of items, over all seeds.

    `by_seed`: the means of the seeds. `kept`: the share of the dense model's score on the same
    items; `kept_by_seed`: likewise by seed. `change`: the difference from the dense score, with
    its interval (paired bootstrap).
    """

    items: int
    score: Estimate
    by_seed: tuple[float, ...]
    kept: float
    kept_by_seed: tuple[float, ...]
    change: Estimate

    @property
    def spread(self) -> float | None:
        """The standard deviation of `kept` between seeds; `None` for a single seed."""
        return stdev(self.kept_by_seed) if len(self.kept_by_seed) > 1 else None


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: what it is, its scores, and its compute as a share of dense.

    `captions`: by the F1 of the figures named; `whole_captions`: the share that name all figures
    and no others, as strict as the scoring of questions. `patience`: the factor by which it was
    trained longer than others. `seconds`: its CPU time, over all seeds.
    """

    name: str
    label: str
    section: Section
    size: str
    parameters: int
    learned: Learned
    patience: int
    removed: float
    schedule: Schedule | None
    questions: Score
    captions: Score
    whole_captions: Score
    question_compute: float
    caption_compute: float
    seconds: float

    @property
    def skipped(self) -> float:
        """The share of a question's compute that is skipped."""
        return 1 - self.question_compute


@dataclass(frozen=True, slots=True)
class Speed:
    """One model's measured times, cache bytes and FLOPs for one caption, batch 1."""

    name: str
    label: str
    ttft_s: float
    tpot_s: float
    kv_bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Results:
    """All results of a run.

    `is_whole`: whether no cell is missing. `seconds`: CPU time of all cells together.
    """

    environment: Mapping[str, Any]
    effort: Mapping[str, int]
    seeds: tuple[int, ...]
    is_whole: bool
    seconds: float
    rows: tuple[Row, ...]
    similarity: tuple[LayerSimilarity, ...]
    speeds: tuple[Speed, ...]

    def row(self, name: str) -> Row | None:
        """The row of that name, if it was measured."""
        return next((row for row in self.rows if row.name == name), None)

    def of(self, section: Section) -> tuple[Row, ...]:
        """The rows of one section."""
        return tuple(row for row in self.rows if row.section is section)

    def steps(self, row: Row) -> int:
        """How many steps a row was trained for."""
        return 0 if row.learned is Learned.NOTHING else self.effort["steps"] * row.patience

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    def save(self, path: Path) -> None:
        """Write `to_dict` as JSON."""
        write_json(path, _rounded(self.to_dict()), indent=1)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            ResultsError: the file is missing, malformed or of another version.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {document['schema_version']}")
            return cls.from_dict(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            allowed = "a file that `fastskip study paper` wrote"
            raise ResultsError(f"{path}: {error}; allowed: {allowed}") from error

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Results:
        """The inverse of `to_dict`, after a round trip through JSON."""
        return cls(
            environment=document["environment"],
            effort=document["effort"],
            seeds=tuple(document["seeds"]),
            is_whole=document["is_whole"],
            seconds=document["seconds"],
            rows=tuple(_row(each) for each in document["rows"]),
            similarity=tuple(LayerSimilarity.from_dict(each) for each in document["similarity"]),
            speeds=tuple(Speed(**each) for each in document["speeds"]),
        )


def judge(
    found: Sequence[Evaluation],
    dense: Sequence[Evaluation],
    kinds: Sequence[str],
    *,
    is_strict: bool = False,
) -> Score:
    """The score of one cell against the dense model; one evaluation per seed, in the same order.

    `is_strict`: only a full score counts, as 1.
    """
    # with few items, a seed may lack some kinds
    ours, theirs = (
        [each.scores(*(kind for kind in each.kinds if kind in kinds)) for each in evaluations]
        for evaluations in (found, dense)
    )
    if is_strict:
        ours, theirs = ([(each == 1) * 1.0 for each in scores] for scores in (ours, theirs))
    means = tuple(float(each.mean()) for each in ours)
    kept = tuple(a / float(b.mean()) for a, b in zip(means, theirs, strict=True))
    pooled, reference = np.concatenate(ours), np.concatenate(theirs)
    return Score(
        items=len(pooled),
        score=bootstrap(pooled),
        by_seed=means,
        kept=fmean(kept),
        kept_by_seed=kept,
        change=paired_bootstrap(reference, pooled),
    )


def row_of(
    cell: Cell,
    scores: tuple[Score, Score, Score],
    compute: tuple[float, float],
    parameters: int,
    seconds: float,
) -> Row:
    """A cell with its measurements.

    `scores`: of questions, captions and whole captions; `compute`: of a question and a caption.
    """
    questions, captions, whole_captions = scores
    return Row(
        name=cell.name,
        label=cell.label,
        section=cell.section,
        size=cell.size.label,
        parameters=parameters,
        learned=cell.learned,
        patience=cell.patience,
        removed=cell.removed,
        schedule=cell.schedule,
        questions=questions,
        captions=captions,
        whole_captions=whole_captions,
        question_compute=compute[0],
        caption_compute=compute[1],
        seconds=seconds,
    )


def _row(document: Mapping[str, Any]) -> Row:
    schedule = document["schedule"]
    return Row(
        **{
            **document,
            "section": Section(document["section"]),
            "learned": Learned(document["learned"]),
            "schedule": None
            if schedule is None
            else Schedule(
                Part(schedule["part"]),
                Scope(schedule["scope"]),
                schedule["interval"],
                schedule["start"],
            ),
            "questions": _score(document["questions"]),
            "captions": _score(document["captions"]),
            "whole_captions": _score(document["whole_captions"]),
        }
    )


def _score(document: Mapping[str, Any]) -> Score:
    return Score(
        **{
            **document,
            "score": Estimate(**document["score"]),
            "change": Estimate(**document["change"]),
            "by_seed": tuple(document["by_seed"]),
            "kept_by_seed": tuple(document["kept_by_seed"]),
        }
    )


def _rounded(value: Any) -> Any:
    """Rounds to six decimals: more would be noise, and the files are bundled."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
