"""Device memory: uninitialised buffers, which tests can poison, and asynchronous copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

_poison: ContextVar[bool] = ContextVar("poison", default=False)


def outside_inference_mode() -> AbstractContextManager[object]:
    """Leaves a caller's inference mode, only if it is on: leaving costs as much as allocating."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that the caller promises to write before reading.

    Every uninitialised buffer of the runtime comes from here: inside ``poisoned()`` it starts as
    NaN, so a slot that is read but was never written cannot go unnoticed. It outlives a caller's
    inference mode, which would forbid later writes.
    """
    with outside_inference_mode():
        memory = torch.empty(shape, dtype=dtype, device=device)
    if _poison.get() and dtype.is_floating_point:
        memory.fill_(float("nan"))
    return memory


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copies ``numbers`` from the host to ``device``, unless already there, without a host sync."""
    return _sendable(numbers, device).to(device, non_blocking=True)


def copy_over(numbers: Tensor, there: Tensor) -> None:
    """Copies ``numbers`` from the host to memory ``there``, without a host sync."""
    there.copy_(_sendable(numbers, there.device), non_blocking=True)


def _sendable(numbers: Tensor, device: torch.device) -> Tensor:
    """``numbers`` in memory that the device can copy from asynchronously."""
    is_sent = device.type == "cuda" and numbers.device.type == "cpu"
    return numbers.pin_memory() if is_sent else numbers


@contextmanager
def on_host() -> Iterator[None]:
    """Within this block tensors are created on the host by default, whatever the user's default
    device."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Makes a GPU current within this block: kernels, events and graphs go to its stream, wherever
    their memory lies."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this block ``empty`` returns NaN-filled memory."""
    token = _poison.set(True)
    try:
        yield
    finally:
        _poison.reset(token)
