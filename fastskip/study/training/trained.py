"""The result of a training run: the model, how the run went, and how to save it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.atomic_files import writing
from fastskip.loading import save_policy
from fastskip.policy import SkipPolicy
from fastskip.study.training.learner import TrainingError
from fastskip.study.training.settings import Settings


@dataclass(slots=True)
class Trained:
    """A trained model and how its training went.

    Attributes:
        model: the given model, trained in place; with `Parts.LORA`, the ``peft.PeftModel`` around
            it.
        policy: what it was trained under; with `Parts.ROUTERS`, with the trained routers.
        losses: of every optimiser step, including those before a resume.
        step_seconds: of this run's steps: forward, backward and update, without loading data.
        rows: real rows of all forwards of this run.
        examples: how many examples these forwards saw.
        broken: what is wrong with each example that was left out.
    """

    model: Any
    settings: Settings
    policy: SkipPolicy
    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    rows: int
    examples: int
    broken: tuple[str, ...]

    @property
    def seconds_per_step(self) -> float | None:
        """The median; `None` if no step was left to do."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def rows_per_second(self) -> float | None:
        """Real rows (tokens and image features) per second of the steps; `None` without steps."""
        return self.rows / sum(self.step_seconds) if self.step_seconds else None

    def save(self, folder: str | Path, processor: Any = None, *, merge: bool = False) -> None:
        """Writes an ordinary checkpoint with its policy; with LORA, the adapters and the policy.

        ``merge``: with LORA, add the adapters to the weights (for good) and write the whole model.
        ``processor``: written beside it, if given.

        Raises:
            TrainingError: a model that is not a ``peft.PeftModel`` holds an earlier run's adapters.
            OSError: the folder cannot be written; a full disk is named.
        """
        folder = Path(folder)
        has_adapters = hasattr(self.model, "merge_and_unload")  # until they are merged
        if has_adapters and merge:
            self.model = self.model.merge_and_unload()
        elif has_adapters:
            save_policy(self.model.get_base_model(), folder)
        elif any(hasattr(module, "base_layer") for module in self.model.modules()):
            needed = "merge them into its weights (merge_and_unload of the earlier run's model)"
            raise TrainingError(f"model: holds adapters; needed: {needed}")
        with writing(folder):
            self.model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
