"""Training while skipping: projector, language model, adapters or routers, under a policy."""

from fastskip.prompts.conversations import DataError, Example, JsonLines, Turn
from fastskip.study.training.events import Masks
from fastskip.study.training.learner import TrainingError
from fastskip.study.training.loop import train
from fastskip.study.training.settings import (
    Lora,
    Padding,
    Parts,
    Precision,
    Schedule,
    Settings,
    SettingsError,
)
from fastskip.study.training.trained import Trained

__all__ = [
    "DataError",
    "Example",
    "JsonLines",
    "Lora",
    "Masks",
    "Padding",
    "Parts",
    "Precision",
    "Schedule",
    "Settings",
    "SettingsError",
    "Trained",
    "TrainingError",
    "Turn",
    "train",
]
