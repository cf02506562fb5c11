"""The module that the trainer sees: a prepared model, its loss and its trained parameters."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastskip.study.training.gates import Gates


class TrainingError(ValueError):
    """A run that cannot be started, resumed or saved; says why and what is needed."""


def require_accelerate() -> None:
    """Raises ``TrainingError`` without accelerate, which transformers' trainer needs."""
    if find_spec("accelerate") is None:
        raise TrainingError("accelerate: not installed; needed: pip install 'fastskip[train]'")


class _Loaded(NamedTuple):
    """The keys of a state dict that did not match."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Learner(nn.Module):
    """A model under its policy, with teacher forcing.

    Its state dict holds only the trained parameters, so that a checkpoint of a projector is as
    small as the projector.
    """

    def __init__(self, model: Any, gates: Gates | None, pressure: float) -> None:
        """``pressure``: the weight of the gates' penalty in the loss of one forward."""
        super().__init__()
        self.model, self.gates, self._pressure = model, gates, pressure
        self.rows: int | Tensor = 0
        self.examples = 0
        """Like the real rows, counted over all forwards so far."""

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """``loss``, scalar: the mean over answer tokens (of all forwards of a step, where
        ``num_items_in_batch`` counts them), plus the routers' penalty."""
        self.rows = self.rows + inputs["attention_mask"].sum()
        self.examples += len(inputs["attention_mask"])
        loss = self.model(**inputs, use_cache=False).loss
        penalty = None if self.gates is None else self.gates.penalty()
        if penalty is not None:
            loss = loss + self._pressure * penalty
        if not loss.requires_grad:  # for example, a projector and no example with an image
            loss = loss + 0 * torch.stack([p.sum() for p in self.learned().values()]).sum()
        return {"loss": loss}

    def learned(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Copies of the trained parameters, which may be views of larger storages."""
        return {name: p.detach().clone() for name, p in self.learned().items()}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads the trained parameters, which must be exactly those of ``state``."""
        learned = self.learned()
        if state.keys() != learned.keys():
            raise TrainingError(
                f"checkpoint: holds {sorted(state)[:3]}...; needed: {sorted(learned)[:3]}..., the "
                "parameters that these settings train"
            )
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(state[name])
        return _Loaded([], [])
