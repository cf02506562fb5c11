"""Time one call of `generate` as its caller sees it: a streamer records when tokens arrive."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastskip.garbage import no_collection
from fastskip.study.bench.contenders import Contender, Models, Source
from fastskip.study.bench.errors import BenchError
from fastskip.timing import WARM_TOKENS, Arrivals, on_entry, warm_counts

Inputs = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one call, in seconds.

    `ttft`: from the call to the first token on the host, vision tower included. `prefill`: the part
    of it from entering the decoder on, measured in a separate call on a GPU and for compiled
    Hugging Face. `tpot`: mean time per further token. `decode`: median time per further token.
    `call`: the whole call.
    """

    ttft: float
    prefill: float
    tpot: float
    decode: float
    call: float


def sample(contender: Contender, models: Models, inputs: Inputs, new_tokens: int) -> Sample:
    """One timed call after some warm-up calls; models must be `endless`.

    Warming up is fair, since in use a policy is set once and runs often.
    """
    model = contender.model(models)
    is_cuda = model.device.type == "cuda"
    for count in warm_counts(model.device, new_tokens, WARM_TOKENS):
        generate(contender, model, inputs, count)
    # A hook triggers recompilation, and on a GPU the host's clock does not show when work runs.
    is_apart = is_cuda or contender.source is Source.HF_COMPILED
    arrivals, entry = Arrivals(), _Entry(model.device)
    with no_collection():
        if not is_apart:
            entry.watch(model)
        try:
            _wait(model.device)
            began = time.perf_counter()
            generate(contender, model, inputs, new_tokens, arrivals)
            _wait(model.device)
            call = time.perf_counter() - began
            if is_apart:
                entry.watch(model)
                generate(contender, model, inputs, 1)
                prefill = entry.seconds_since()
            else:
                prefill = arrivals.tokens[0] - entry.began
        finally:
            entry.leave()
    first, *_, last = arrivals.tokens
    return Sample(
        ttft=first - began,
        prefill=prefill,
        tpot=(last - first) / (new_tokens - 1),
        decode=statistics.median(b - a for a, b in pairwise(arrivals.tokens)),
        call=call,
    )


def generate(
    contender: Contender, model: Any, inputs: Inputs, count: int, streamer: Any = None
) -> Tensor:
    """The greedy new tokens `[B, count]`, on the host.

    Raises:
        BenchError: `generate` returned a different number of tokens.
    """
    out: Tensor = model.generate(
        **inputs, do_sample=False, max_new_tokens=count, streamer=streamer, **contender.options
    )
    made = out[:, inputs["input_ids"].shape[1] :]
    if made.shape[1] != count:
        found = f"generate made {made.shape[1]} tokens instead of {count}"
        raise BenchError(f"{contender.label}: {found}")
    return made.cpu()


class _Entry:
    """Marks when the prompt enters the decoder, on the host's clock and on the GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.began = 0.0
        self._device = device
        self._event: Any = None
        self._hook: Any = None

    def watch(self, model: Any) -> None:
        self._hook = on_entry(model, self._enter)

    def leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _enter(self) -> None:
        self.began = time.perf_counter()
        if self._device.type == "cuda":
            self._event = self._mark()

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds_since(self) -> float:
        """Seconds from there until now: by CUDA events on a GPU, else by the host's clock."""
        if self._event is None:
            return time.perf_counter() - self.began
        end = self._mark()
        end.synchronize()
        return float(self._event.elapsed_time(end)) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
