"""The module that a trainer sees: a prepared model, its loss, and the little of it that learns."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastskip.study.training.gates import Gates


class TrainingError(ValueError):
    """A run that cannot be started or gone on with; says why and what is needed."""


def require_accelerate() -> None:
    """Raises ``TrainingError`` without the package that transformers' trainer needs."""
    if find_spec("accelerate") is None:
        raise TrainingError("accelerate: is missing; needed: pip install 'fastskip[train]'")


class _Loaded(NamedTuple):
    """What of a state dict did not fit."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Learner(nn.Module):
    """A model under its policy, teacher-forced.

    Its state dict holds what learns and nothing else, so that a checkpoint of a projector is as
    small as the projector.
    """

    def __init__(self, model: Any, gates: Gates | None, pressure: float) -> None:
        """``pressure``: what the gates' penalty weighs in the loss of one forward."""
        super().__init__()
        self.model, self.gates, self._pressure = model, gates, pressure
        self.rows: int | Tensor = 0
        self.examples = 0
        """Of all forwards so far, as are the real rows."""

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """``loss``, scalar: the mean over the answers' tokens (of all forwards of a step, where
        ``num_items_in_batch`` counts them), plus the penalty of routers."""
        self.rows = self.rows + inputs["attention_mask"].sum()
        self.examples += len(inputs["attention_mask"])
        loss = self.model(**inputs, use_cache=False).loss
        penalty = None if self.gates is None else self.gates.penalty()
        if penalty is not None:
            loss = loss + self._pressure * penalty
        if not loss.requires_grad:  # say, of a projector, where no example has an image
            loss = loss + 0 * torch.stack([p.sum() for p in self.learned().values()]).sum()
        return {"loss": loss}

    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Copies of what learns: parameters may be views of larger storages."""
        return {name: p.detach().clone() for name, p in self.learned().items()}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Of what learns."""
        learned = self.learned()
        if state.keys() != learned.keys():
            raise TrainingError(
                f"checkpoint: holds {sorted(state)[:3]}...; needed: {sorted(learned)[:3]}..., what "
                "these settings train"
            )
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(state[name])
        return _Loaded([], [])
