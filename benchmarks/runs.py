"""One `generate` call, timed from inside."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from benchmarks.memory import peak_bytes, reset_peak
from fastskip.garbage import no_collection
from fastskip.timing import on_entry

GROUPS = ("prefill", "decode", "e2e")


@dataclass(frozen=True)
class Run:
    """Timings of one `generate` call in seconds, and the tokens it generated."""

    prefill: float
    decode: float
    e2e: float
    ttft: float
    peak_bytes: int | None
    tokens: Tensor


def median(runs: Iterable[Run], quantity: str) -> float:
    """The median of a field of `Run`, in seconds."""
    return statistics.median(float(getattr(run, quantity)) for run in runs)


class _Stopwatch:
    """Timestamps of one `generate` call: a stopping criterion that never stops it.

    Hugging Face's loop and ours both call it after every token.
    """

    def __init__(self) -> None:
        self.entries: list[float] = []
        self.tokens: list[float] = []

    def enter(self) -> None:
        """The decoder is entered."""
        self.entries.append(time.perf_counter())

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tokens.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_once(model: Any, inputs: dict[str, Tensor], n_new: int, cache: str | None = None) -> Run:
    """Time one `generate` call on a CPU; `cache` names one of Hugging Face's caches."""
    watch = _Stopwatch()
    options = {} if cache is None else {"cache_implementation": cache}
    hook = on_entry(model, watch.enter)
    reset_peak("cpu")
    try:
        with no_collection():
            begin = time.perf_counter()
            tokens = model.generate(
                **inputs,
                max_new_tokens=n_new,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([watch]),
                **options,
            )
            end = time.perf_counter()
    finally:
        hook.remove()
    if len(watch.tokens) != n_new:
        raise RuntimeError(f"generate made {len(watch.tokens)} tokens instead of {n_new}")
    gaps = [b - a for a, b in zip(watch.tokens, watch.tokens[1:], strict=False)]
    return Run(
        prefill=watch.tokens[0] - watch.entries[0],
        decode=statistics.median(gaps) if gaps else math.nan,
        e2e=end - begin,
        ttft=watch.tokens[0] - begin,
        peak_bytes=peak_bytes("cpu"),
        tokens=tokens[:, inputs["input_ids"].shape[1] :].cpu(),
    )
