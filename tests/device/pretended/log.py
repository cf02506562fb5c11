"""What was seen on the pretended device."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path

import transformers

import fastskip

_NAMED = tuple(f"{Path(inspect.getfile(module)).parent}/" for module in (fastskip, transformers))
"""Whose functions are named."""
_DEPTH = 5


@dataclass(slots=True)
class Log:
    """One call of ``generate``.

    Attributes:
        faults: what CUDA forbids.
        waits: where the host waited for the device: for ``what``, in which ``function``, and the
            ``stack`` of those who called it; noted while ``notes_waits``.
        is_capturing: whether a graph is being captured.
    """

    faults: list[str] = field(default_factory=list)
    waits: list[dict[str, str]] = field(default_factory=list)
    notes_waits: bool = False
    is_capturing: bool = False

    def clear(self) -> None:
        self.faults, self.waits, self.notes_waits = [], [], False

    def fault(self, what: str) -> None:
        self.faults.append(f"{what} in {stack()}")

    def wait(self, what: str) -> None:
        if self.is_capturing:
            self.fault(f"{what}: a wait in a capture")
        if self.notes_waits:
            found = stack()
            self.waits.append({"what": what, "function": found.partition(":")[0], "stack": found})

    def copy(self, what: str) -> None:
        """Between host and device, waiting or not."""
        if self.is_capturing:
            self.fault(f"{what}: a copy in a capture")


LOG = Log()


def stack() -> str:
    """The innermost functions of the package or of transformers: ``function:line < caller:line``
    and so on."""
    found: list[str] = []
    frame = inspect.currentframe()
    while frame is not None and len(found) < _DEPTH:
        if frame.f_code.co_filename.startswith(_NAMED):
            found.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)
