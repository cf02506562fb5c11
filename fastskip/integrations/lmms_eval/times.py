"""The generation times of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median


@dataclass
class TaskTimes:
    """The times of one task's batches.

    Attributes:
        seconds: total time in `generate`.
        tokens: generated tokens, including end tokens but not the padding after them.
        ttft: seconds to the first token of each batch that was timed token by token.
        steps: seconds of each further step of these batches.
    """

    seconds: float = 0.0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def add(self, began: float, ended: float, tokens: int, arrivals: Sequence[float]) -> None:
        """Adds a batch; `arrivals`: when its tokens came (beam search cannot stream, so none)."""
        self.seconds += ended - began
        self.tokens += tokens
        self.ttft += [first - began for first in arrivals[:1]]
        self.steps += [later - earlier for earlier, later in pairwise(arrivals)]

    @property
    def tokens_per_second(self) -> float:
        """Over all batches together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def latencies(self) -> dict[str, float]:
        """Medians in seconds, where there are any: `ttft` over batches, `tpot` over steps."""
        found = {"ttft": self.ttft, "tpot": self.steps}
        return {name: median(values) for name, values in found.items() if values}
