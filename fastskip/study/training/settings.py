"""Training settings: one frozen object, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from fastskip.policy.fields import SEEDS

Choice = TypeVar("Choice", bound=StrEnum)


class Parts(StrEnum):
    """What learns; everything else is frozen and stays bitwise unchanged.

    PROJECTOR: what maps image features into the language model (the setting of "Skipping
    Computations in Multimodal LLMs"). LANGUAGE: projector and language model. EVERYTHING: the
    vision encoder too. LORA: adapters on the linear layers of the language model. ROUTERS: the
    linear routers of the model's policy.
    """

    PROJECTOR = "projector"
    LANGUAGE = "language"
    EVERYTHING = "everything"
    LORA = "lora"
    ROUTERS = "routers"


class Precision(StrEnum):
    """WEIGHTS: everything is computed in the dtype of the model's weights. BFLOAT16: matrix
    products are computed in bfloat16 (autocast), and trained weights are held in fp32."""

    WEIGHTS = "weights"
    BFLOAT16 = "bfloat16"


class Schedule(StrEnum):
    """The learning rate after the warm-up: constant, or decaying to zero."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Padding(StrEnum):
    """The side on which the shorter sequences of a batch are padded."""

    LEFT = "left"
    RIGHT = "right"


RATES = {
    Parts.PROJECTOR: 1e-3,
    Parts.LANGUAGE: 2e-5,
    Parts.EVERYTHING: 2e-5,
    Parts.LORA: 2e-4,
    Parts.ROUTERS: 1e-2,
}
"""Default learning rates; the first four are those of LLaVA-1.5's recipes."""


class SettingsError(ValueError):
    """An invalid setting; names it, its value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: {value!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters ``W + alpha / rank * B A`` (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _whole("lora.rank", self.rank)
        _number("lora.alpha", self.alpha, 0, math.inf, open_low=True)
        _number("lora.dropout", self.dropout, 0, 1, open_high=True)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        parts: what learns.
        steps, epochs: how long, in optimiser steps or passes over the data; one of them, or
            neither for one pass.
        batch, accumulation: examples per forward, and forwards per optimiser step.
        learning_rate: the peak; ``None`` takes that of `RATES`.
        schedule, warmup: the decay, and the share of the steps, in [0, 1), that warm up.
        weight_decay: AdamW's.
        max_gradient_norm: gradients are clipped to this norm; 0 turns clipping off.
        seed: of the order of the examples, adapters and dropout.
        precision, gradient_checkpointing: the dtypes of computation, and whether a layer's
            activations are dropped and recomputed in the backward pass.
        padding: the side that is padded.
        save_every: optimiser steps from one checkpoint to the next; ``None`` writes none.
        resume: continue from the last checkpoint, if there is one.
        skip_broken: leave out and record examples that cannot be used, instead of stopping.
        lora: the adapters, for `Parts.LORA`.
        rate, pressure: for `Parts.ROUTERS`, the target share of candidates that skip, and the
            weight in the loss of the squared distance from it.
    """

    parts: Parts = Parts.PROJECTOR
    steps: int | None = None
    epochs: float | None = None
    batch: int = 8
    accumulation: int = 1
    learning_rate: float | None = None
    schedule: Schedule = Schedule.COSINE
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0
    precision: Precision = Precision.WEIGHTS
    gradient_checkpointing: bool = False
    padding: Padding = Padding.RIGHT
    save_every: int | None = None
    resume: bool = False
    skip_broken: bool = False
    lora: Lora = field(default_factory=Lora)
    rate: float | None = None
    pressure: float = 10.0

    def __post_init__(self) -> None:
        _set(self, "parts", _choice(Parts, "parts", self.parts))
        _set(self, "schedule", _choice(Schedule, "schedule", self.schedule))
        _set(self, "precision", _choice(Precision, "precision", self.precision))
        _set(self, "padding", _choice(Padding, "padding", self.padding))
        if self.steps is not None and self.epochs is not None:
            raise SettingsError("epochs", self.epochs, "steps or epochs, not both")
        for name in ("steps", "save_every"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        if self.epochs is not None:
            _number("epochs", self.epochs, 0, math.inf, open_low=True)
        for name in ("batch", "accumulation"):
            _whole(name, getattr(self, name))
        _whole("seed", self.seed, 0, SEEDS - 1)
        if self.learning_rate is not None:
            _number("learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        _number("warmup", self.warmup, 0, 1, open_high=True)
        for name in ("weight_decay", "max_gradient_norm", "pressure"):
            _number(name, getattr(self, name), 0, math.inf)
        if self.rate is not None:
            _number("rate", self.rate, 0, 1)
            if self.parts is not Parts.ROUTERS:
                raise SettingsError("rate", self.rate, "none, unless parts is routers")

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up."""
        return RATES[self.parts] if self.learning_rate is None else self.learning_rate


def _set(settings: object, name: str, value: object) -> None:
    object.__setattr__(settings, name, value)


def _choice(kind: type[Choice], field: str, value: object) -> Choice:
    try:
        return kind(str(value))
    except ValueError:
        raise SettingsError(field, value, ", ".join(kind)) from None


def _whole(field: str, value: object, low: int = 1, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        end = "" if high is None else f" to {high}"
        raise SettingsError(field, value, f"a whole number from {low}{end}")


def _number(
    field: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value):  # type: ignore[arg-type]
        found = float(value)  # type: ignore[arg-type]
        is_end = (open_low and found == low) or (open_high and found == high)
        if low <= found <= high and not is_end:
            return
    opening, closing = "(" if open_low else "[", ")" if open_high or math.isinf(high) else "]"
    raise SettingsError(field, value, f"a number in {opening}{low:g}, {high:g}{closing}")
