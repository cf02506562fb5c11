"""What tests of the device executor share: steps that behave like graphs, counted."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastskip.generation.device_step import DeviceStep
from fastskip.ops import Implementation

IMPL = "torch"
"""The device executor wherever tests run."""

LAUNCHED: list[DeviceStep] = []


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[DeviceStep]:
    """Steps as a CUDA graph would run them; each launch is noted.

    A capture runs the step a few times, and afterwards its results always lie in the same memory.
    """
    LAUNCHED.clear()

    def capture(
        work: Callable[[], None], device: torch.device, pool: Any = None
    ) -> Callable[[], None]:
        step: DeviceStep = work.__self__  # type: ignore[attr-defined]
        for _ in range(3):
            work()
        logits = step.logits

        def replay() -> None:
            LAUNCHED.append(step)
            seen = step.logits
            work()
            if logits is not None:
                assert step.logits is not None
                logits.copy_(step.logits)
                step.logits = seen  # no Python runs in a replay

        return replay

    monkeypatch.setattr("fastskip.generation.device_step.capture", capture)
    # Only kernels are captured: here the torch form stands for them.
    stand_in = SimpleNamespace(TRITON=Implementation(IMPL))
    monkeypatch.setattr("fastskip.generation.device_step.Implementation", stand_in)
    return LAUNCHED
