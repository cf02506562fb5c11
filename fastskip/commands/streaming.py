"""Streaming an answer to the terminal, with the time of each token."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from fastskip.study.calls import placed
from fastskip.wording import counted


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Seconds from the start of the call to each new token."""

    seconds: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.seconds[0]

    @property
    def tpot(self) -> float | None:
        """Mean time per further token; None if there was only one token."""
        further = len(self.seconds) - 1
        return (self.seconds[-1] - self.seconds[0]) / further if further else None

    def summary(self) -> str:
        count, total = len(self.seconds), self.seconds[-1]
        tpot = "-" if self.tpot is None else f"{1e3 * self.tpot:.1f} ms"
        return (
            f"{counted(count, 'token')} in {total:.2f} s: TTFT {1e3 * self.ttft:.1f} ms, "
            f"TPOT {tpot}, {count / total:.1f} tokens/s"
        )


class TimedStreamer(TextStreamer):
    """Prints text as soon as it is final, and records when each token arrived."""

    def __init__(self, tokenizer: Any, silent: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.silent = silent
        self.clock: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.clock.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.silent:
            super().on_finalized_text(text, stream_end)


def stream(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    options: dict[str, Any],
    seed: int | None,
    silent: bool = False,
) -> TokenTimes:
    """Generate, print as it goes unless `silent`, and time every token."""
    given, streamer = placed(inputs, model), TimedStreamer(tokenizer, silent)
    if seed is not None:
        torch.manual_seed(seed)
    start = time.perf_counter()
    model.generate(**given, **options, streamer=streamer)
    return TokenTimes(tuple(moment - start for moment in streamer.clock))
