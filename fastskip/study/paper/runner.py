"""Runs the experiments cell by cell and seed by seed, each stored in its own file.

An interrupted run resumes at the first cell without a file; a cell whose file was made under other
settings or weights is measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

import fastskip
from fastskip.demo.evaluation import Item, prompt
from fastskip.demo.model import Size
from fastskip.demo.results import environment
from fastskip.demo.scenes import QuestionKind, draw
from fastskip.demo.smaller import load, weights_path
from fastskip.demo.text import build_processor
from fastskip.fingerprints import fingerprint
from fastskip.plan.single_call import SingleCall
from fastskip.study.evaluation.answers import Evaluation
from fastskip.study.evaluation.exam import Exam
from fastskip.study.paper.experiments import DENSE, Cell, Learned, cells
from fastskip.study.paper.kept import kept, name_of, read
from fastskip.study.paper.measuring import (
    CAPTION,
    QUESTION_KINDS,
    Effort,
    asked,
    exam_of,
    workload,
)
from fastskip.study.paper.plans import canonical_plan, parameters, plan_of_cell
from fastskip.study.paper.results import Results, Speed, judge, row_of
from fastskip.study.paper.speeds import contenders, timed
from fastskip.study.paper.tuning import remove_weights_, tune_
from fastskip.study.similarity import LayerSimilarity, similarities

FORMAT = 2
"""Version of the cells' files; raising it makes all cells be measured again."""
Tick = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One cell under one seed. `seconds`: CPU time, summed over cores; `losses`: of the training
    steps, if any."""

    evaluation: Evaluation
    seconds: float
    losses: tuple[float, ...] = ()


class Study:
    """The experiments in one folder."""

    def __init__(
        self,
        folder: Path,
        seeds: int = 3,
        effort: Effort | None = None,
        chosen: Sequence[Cell] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Measures nothing yet.

        Args:
            folder: where cells are stored and results are written.
            seeds: how many seeds; each has its own items and training data.
            effort: how much is measured.
            chosen: the cells, the dense one first.
            device: where models run.
        """
        if seeds < 1:
            raise ValueError(f"seeds: {seeds}; allowed: 1 or more")
        self.folder, self.seeds = folder, tuple(range(seeds))
        self.effort, self.device = effort or Effort(), torch.device(device)
        self.cells = tuple(chosen or cells())
        self.processor = build_processor()
        self._exams: dict[int, Exam] = {}

    @property
    def steps(self) -> int:
        """How many measurements there are, including stored ones."""
        return len(self.cells) * len(self.seeds) + 2

    def run(self, on_step: Tick = lambda name: None) -> Results:
        """Measure what is missing; returns all results. `on_step`: called before each step."""
        for seed in self.seeds:
            for cell in self.cells:
                on_step(f"{cell.name}, seed {seed}")
                self.outcome(cell, seed)
        on_step("similarity")
        self.similarity()
        on_step("times")
        self.speeds()
        return self.results()

    def outcome(self, cell: Cell, seed: int) -> Outcome:
        """One cell under one seed: read from its file, or else measured."""

        def measured() -> dict[str, Any]:
            began = time.process_time()
            model, masks = self._prepared(cell)
            losses = tune_(model, cell, seed, self.effort, self.processor, masks)
            evaluation = self.exam(seed).take(model)
            taken = time.process_time() - began
            return {"seconds": taken, "losses": losses, **evaluation.to_dict()}

        settings = self._settings(cell, seed)
        found = kept(self._path(settings), settings, measured)
        return Outcome(Evaluation.from_dict(found), found["seconds"], tuple(found["losses"]))

    def has(self, cell: Cell, seed: int) -> bool:
        """Whether the outcome is stored already."""
        settings = self._settings(cell, seed)
        return read(self._path(settings), settings) is not None

    def _prepared(self, cell: Cell) -> tuple[Any, Any]:
        """The cell's model before training, and its pruning masks, if any."""
        model = load(cell.size).to(self.device)
        masks = remove_weights_(model, cell.removed, self.processor) if cell.removed else None
        return fastskip.apply_(model, cell.policy, impl="reference"), masks

    def exam(self, seed: int) -> Exam:
        """The items that all cells answer under a seed."""
        if seed not in self._exams:
            config = load(DENSE.size).config
            self._exams[seed] = exam_of(seed, self.effort, self.processor, config)
        return self._exams[seed]

    def similarity(self) -> tuple[LayerSimilarity, ...]:
        """Similarities in the dense model's layers, over prompts and answers of seed 0."""
        count = self.effort.similarity_samples

        def measured() -> dict[str, Any]:
            items = asked(0, self.effort)[:: max(1, self._items // count)][:count]
            inputs = [self._inputs(item) for item in items]
            found = similarities(load(Size.LARGE).to(self.device), inputs, new_tokens=24)
            return {"similarity": [each.to_dict() for each in found]}

        settings = self._common | {"samples": count}
        found = kept(self.folder / "similarity.json", settings, measured)
        return tuple(LayerSimilarity.from_dict(each) for each in found["similarity"])

    def speeds(self) -> tuple[Speed, ...]:
        """Times of one caption, batch 1, on this machine, for the `contenders`."""
        chosen = contenders()
        settings = self._common | {
            "rounds": self.effort.timing_rounds,
            "models": [self._settings(cell, 0) for cell in chosen],
            "environment": self._environment,
        }

        def measured() -> dict[str, Any]:
            item = next(x for x in asked(0, self.effort) if x[1].kind is QuestionKind.CAPTION)
            inputs = self._inputs(item).to(self.device)
            rounds = self.effort.timing_rounds
            found = timed(chosen, inputs, self.loads[1], rounds, self.device)
            return {"speeds": [asdict(each) for each in found]}

        found = kept(self.folder / "speeds.json", settings, measured)
        return tuple(Speed(**each) for each in found["speeds"])

    def results(self) -> Results:
        """The results so far; a cell's row covers the seeds that are stored for it.

        Dense cells, similarities and times are measured if they are missing.
        """
        rows, missing, total = [], 0, 0.0
        dense = {seed: self.outcome(DENSE, seed).evaluation for seed in self.seeds}
        for cell in self.cells:
            there = [seed for seed in self.seeds if self.has(cell, seed)]
            missing += len(self.seeds) - len(there)
            if not there:
                continue
            outcomes = [self.outcome(cell, seed) for seed in there]
            evaluations = [each.evaluation for each in outcomes]
            references = [dense[seed] for seed in there]
            seconds = sum(each.seconds for each in outcomes)
            total += seconds
            rows.append(
                row_of(
                    cell,
                    (
                        judge(evaluations, references, QUESTION_KINDS),
                        judge(evaluations, references, [CAPTION]),
                        judge(evaluations, references, [CAPTION], is_strict=True),
                    ),
                    self._compute(cell),
                    parameters(cell.size),
                    seconds,
                )
            )
        return Results(
            environment=self._environment,
            effort=asdict(self.effort),
            seeds=self.seeds,
            is_whole=not missing,
            seconds=total,
            rows=tuple(rows),
            similarity=self.similarity(),
            speeds=self.speeds(),
        )

    @cached_property
    def loads(self) -> tuple[SingleCall, SingleCall]:
        """The workloads of a typical question and a typical caption of seed 0."""
        found = asked(0, self.effort)
        captions = [each for each in found if each[1].kind is QuestionKind.CAPTION]
        questions = [each for each in found if each[1].kind is not QuestionKind.CAPTION]
        tokenizer = self.processor.tokenizer
        return workload(questions, tokenizer), workload(captions, tokenizer)

    def _compute(self, cell: Cell) -> tuple[float, float]:
        """FLOPs of a question and of a caption, as shares of the dense large model's."""
        own, dense = plan_of_cell(cell), plan_of_cell(DENSE)
        question, caption = (load.cost(own).flops / load.cost(dense).flops for load in self.loads)
        return question, caption

    def _inputs(self, item: Item) -> Any:
        scene, question = item
        text = prompt(self.processor, question.text)
        return self.processor(images=[draw(scene)], text=[text], return_tensors="pt")

    @property
    def _items(self) -> int:
        return self.effort.questions + self.effort.captions

    @property
    def _common(self) -> dict[str, Any]:
        """The settings that every file depends on."""
        return {
            "format": FORMAT,
            "weights": _digest(Size.LARGE),
            "questions": self.effort.questions,
            "captions": self.effort.captions,
        }

    @property
    def _environment(self) -> dict[str, Any]:
        """The machine and versions that times depend on."""
        return environment(torch.float32) | {"device": str(self.device)}

    def _path(self, settings: Mapping[str, Any]) -> Path:
        return self.folder / "cells" / f"{name_of(settings)}.json"

    def _settings(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Everything that the outcome of a cell depends on."""
        found = self._common | {
            "seed": seed,
            "size": cell.size.label,
            "own_weights": _digest(cell.size),
            "plan": canonical_plan(plan_of_cell(cell)),
            "removed": cell.removed,
            "learned": cell.learned.value,
        }
        if cell.learned is not Learned.NOTHING:
            steps = self.effort.steps * cell.patience
            found |= {"steps": steps, "sequences": self.effort.sequences}
        return found


@cache
def _digest(size: Size) -> str:
    """A fingerprint of the bundled weights of one size."""
    return fingerprint(weights_path(size).read_bytes())
