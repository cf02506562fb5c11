"""The staged recipe: vision encoder, then projector and language model, then everything.

A run is a folder. Its `state.pt` holds everything that the next step depends on, and a step's data
depend only on seed, stage, step and process rank. An interrupted run therefore resumes as if it had
never stopped.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fastskip.atomic_files import atomic_write
from fastskip.demo.dropping import draw_cells, dropped
from fastskip.demo.learning import (
    Optimiser,
    PatchHeads,
    answer_loss,
    exact_match,
    patch_loss,
    rate_factor,
)
from fastskip.demo.model import Size, build_model
from fastskip.demo.packing import IMAGE_COLUMNS, Mixture, Packer, normalise
from fastskip.demo.precision import Precision
from fastskip.demo.scenes import QuestionKind, Split, render, scenes
from fastskip.demo.smaller import take_tower_
from fastskip.demo.team import Team

MIXTURE: Mapping[QuestionKind, float] = {
    QuestionKind.COLOUR: 2.0,
    QuestionKind.SHAPE: 1.5,
    QuestionKind.COUNT: 1.5,
    QuestionKind.EXISTENCE: 1.5,
    # two figures to find and compare: learned last, once locations are known
    QuestionKind.RELATION: 4.0,
    QuestionKind.LOCATION: 1.5,
    QuestionKind.CAPTION: 0.7,
}


class Lesson(StrEnum):
    """What a stage trains."""

    VISION = "vision"
    """the vision tower alone, to tell what each patch shows"""
    LANGUAGE = "language"
    """projector and language model; the tower is frozen"""
    ALL = "all"
    """everything, with some sublayers skipped for the image rows"""


@dataclass(frozen=True)
class Stage:
    """What is trained, for how long and at what learning rate."""

    lesson: Lesson
    steps: int
    batch: int
    rate: float
    warmup: int
    decay: float
    """Share of the steps, at the end, over which the rate decays to 2 %."""


STAGES = (
    Stage(Lesson.VISION, steps=500, batch=64, rate=2e-3, warmup=50, decay=0.7),
    Stage(Lesson.LANGUAGE, steps=440, batch=32, rate=4e-3, warmup=60, decay=0.25),
    Stage(Lesson.ALL, steps=130, batch=32, rate=2e-3, warmup=10, decay=1.0),
)
SMALLER_STAGES = (
    STAGES[1],
    # as many more steps as the large model gets; the shared tower stays frozen
    Stage(Lesson.LANGUAGE, steps=130, batch=32, rate=2e-3, warmup=10, decay=1.0),
)
"""For a model that uses the bundled vision tower."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    folder: Path
    seed: int = 0
    size: Size = Size.LARGE
    has_bundled_tower: bool = False
    """Use the bundled checkpoint's vision tower, not one with fresh weights."""
    precision: Precision = Precision.FLOAT32
    stages: tuple[Stage, ...] = STAGES
    minutes: float | None = None
    """Stop, resumably, after this long."""
    save_every: int = 100
    mixture: Mixture = field(default_factory=lambda: Mixture(MIXTURE))
    started: float = field(default_factory=time.monotonic)

    @property
    def is_late(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes


class Trainer:
    """The model of one run, and its progress."""

    def __init__(
        self, run: Run, tokenizer: PreTrainedTokenizerFast, team: Team | None = None
    ) -> None:
        self.run, self.team = run, team or Team()
        self.model: LlavaForConditionalGeneration = build_model(tokenizer, run.seed, run.size)
        if run.has_bundled_tower:
            take_tower_(self.model)
        torch.manual_seed(run.seed)
        self.heads = PatchHeads(self.model.config.vision_config.hidden_size)
        self.packer = Packer(tokenizer, run.mixture)
        self.stage, self.step = 0, 0
        self.is_bfloat16 = self.team.agree(self.team.is_first and run.precision.is_bfloat16())
        self._optimiser: Optimiser | None = None

    def train(self) -> bool:
        """Run the remaining stages; False if time ran out before the last one finished."""
        self._load()
        while self.stage < len(self.run.stages):
            if not self._train_stage(self.run.stages[self.stage]):
                return False
            self.stage, self.step, self._optimiser = self.stage + 1, 0, None
            self._save()
        return True

    def _train_stage(self, stage: Stage) -> bool:
        optimiser = self._optimiser = self._optimiser or self._new_optimiser(stage)
        self.model.train()
        bar = tqdm(
            range(self.step, stage.steps),
            initial=self.step,
            total=stage.steps,
            desc=stage.lesson.value,
            dynamic_ncols=True,
            disable=not self.team.is_first,
        )
        for step in bar:
            if self.team.agree(self.run.is_late):
                self._save()
                return False
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bfloat16):
                loss, accuracy = self._loss(stage, step)
            loss.backward()
            self.team.average_(optimiser.parameters)
            optimiser.step(rate_factor(step, stage.steps, stage.warmup, stage.decay))
            self.step = step + 1
            if step % 10 == 9:
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
            if self.step % self.run.save_every == 0:
                self._save()
                if stage.lesson is not Lesson.VISION and self.team.is_first:
                    tqdm.write(self._report())
        return True

    def _loss(self, stage: Stage, step: int) -> tuple[Tensor, float]:
        """The loss and the accuracy of one fresh batch."""
        rng = np.random.default_rng([self.run.seed, self.stage, step, self.team.rank])
        share = max(1, stage.batch // self.team.size)
        batch = scenes(Split.TRAIN, share, int(rng.integers(2**31)))
        if stage.lesson is Lesson.VISION:
            pixels = normalise(torch.from_numpy(render(batch)))
            return patch_loss(self.model, self.heads, pixels, batch)
        packed = self.packer.pack(batch, rng)
        is_last = stage.lesson is Lesson.ALL
        depth = self.model.config.text_config.num_hidden_layers
        with dropped(self.model, draw_cells(rng, depth) if is_last else [], IMAGE_COLUMNS):
            loss, right = answer_loss(self.model, packed, train_vision=is_last)
        return loss, right.float().mean().item()

    def _report(self) -> str:
        """Exact match by kind, on the validation split."""
        rng = np.random.default_rng(1)
        self.model.eval()
        found = exact_match(self.model, self.packer.pack(scenes(Split.VALIDATION, 64, 1), rng))
        self.model.train()
        figures = "  ".join(f"{kind.value} {share:.3f}" for kind, share in found.items())
        return f"{self.run.stages[self.stage].lesson} {self.step}: {figures}"

    def _new_optimiser(self, stage: Stage) -> Optimiser:
        named = _learned(stage, self.model, self.heads)
        return Optimiser(named, stage.rate, share=1.0 if stage.lesson is Lesson.VISION else 0.2)

    def _save(self) -> None:
        """Replace `state.pt` atomically: a run interrupted while saving keeps the old one."""
        if not self.team.is_first:
            return
        state = {
            "stage": self.stage,
            "step": self.step,
            "is_bfloat16": self.is_bfloat16,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": self._optimiser and self._optimiser.state_dict(),
        }
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run.folder / "state.pt") as part:
            torch.save(state, part)

    def _load(self) -> None:
        path = self.run.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.stage, self.step = state["stage"], state["step"]
        self.is_bfloat16 = state["is_bfloat16"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        if state["optimiser"] is not None and self.stage < len(self.run.stages):
            self._optimiser = self._new_optimiser(self.run.stages[self.stage])
            self._optimiser.load_state_dict(state["optimiser"])


def _learned(
    stage: Stage, model: LlavaForConditionalGeneration, heads: PatchHeads
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a stage trains."""
    if stage.lesson is Lesson.VISION:
        yield from heads.named_parameters("heads")
    for name, parameter in model.named_parameters():
        is_vision = "vision_tower" in name
        is_learned = stage.lesson is Lesson.ALL or (stage.lesson is Lesson.VISION) == is_vision
        # the tower's last norm feeds only the pooled output, which LLaVA does not read
        if is_learned and "post_layernorm" not in name:
            yield name, parameter
