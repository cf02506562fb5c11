"""The trainer's callback: step times, pruning masks and progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers


class Masks(Protocol):
    """Weights that were pruned and must stay zero."""

    def apply_(self, model: Any) -> object:
        """Sets them to zero, in place."""


class Finished(Exception):
    """A resumed run has no step left to do."""


@dataclass
class Events(transformers.TrainerCallback):  # type: ignore[misc]
    """Times the steps, reapplies the masks after each one, and reports losses."""

    masks: Masks | None
    model: Any
    on_step: Callable[[int, int, float], object]
    seconds: list[float] = field(default_factory=list)
    _began: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._mask()
        schedule = given["lr_scheduler"]
        pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, (peak, share) in zip(given["optimizer"].param_groups, pairs, strict=True):
            # a checkpoint restores the rate of its own schedule, which may be shorter
            group["lr"] = peak * share(schedule.last_epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # when resuming within an epoch, transformers would do one step too many
            raise Finished
        self._began = now(self.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mask()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(now(self.model) - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.on_step(state.global_step, state.max_steps, logs["loss"])

    def _mask(self) -> None:
        if self.masks is not None:
            with torch.no_grad():
                self.masks.apply_(self.model)


def now(model: Any) -> float:
    """The clock in seconds, after everything that was launched on the model's device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
