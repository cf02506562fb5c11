"""What a task's answers took together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median


@dataclass
class TaskTimes:
    """What one task's batches took.

    Attributes:
        seconds: in `generate`, all batches together.
        tokens: that were made, end tokens included, fillings after them not.
        ttft: of each batch that was timed token by token.
        steps: of each further step of those.
    """

    seconds: float = 0.0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def add(self, began: float, ended: float, tokens: int, arrivals: Sequence[float]) -> None:
        """A batch, by the clock; `arrivals`: of its steps (beams know no streamer, so none)."""
        self.seconds += ended - began
        self.tokens += tokens
        self.ttft += [first - began for first in arrivals[:1]]
        self.steps += [later - earlier for earlier, later in pairwise(arrivals)]

    @property
    def tokens_per_second(self) -> float:
        """Of all batches together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def latencies(self) -> dict[str, float]:
        """Medians in seconds of what there is: `ttft` over batches, `tpot` over steps."""
        found = {"ttft": self.ttft, "tpot": self.steps}
        return {name: median(values) for name, values in found.items() if values}
