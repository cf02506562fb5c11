"""First calls: compilation, CUDA graph capture, token checks, and what is measured only once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastskip.loading import record_routing
from fastskip.plan import SkipPlan
from fastskip.study.bench.contenders import DENSE, HF, Contender, Models, Source
from fastskip.study.bench.errors import BenchError
from fastskip.study.bench.results import Agreement
from fastskip.study.bench.samples import Inputs, generate
from fastskip.study.observed_rates import Rates, observed_rates

logger = logging.getLogger(__name__)
_EXACT = (torch.float32, torch.float64)
"""Dtypes in which greedy tokens must be equal; narrower ones may break near-ties either way."""


@dataclass(frozen=True, slots=True)
class FirstCall:
    """What a contender's first call shows.

    `rates`: skip rates in prefill and in decode steps, for a policy with routers. `left_out`: why
    the contender cannot be timed; all else is then `None`.
    """

    tokens: Tensor | None = None
    peak_bytes: int | None = None
    rates: tuple[Rates, Rates] | None = None
    left_out: str | None = None


def first_call(
    contender: Contender, models: Models, plan: SkipPlan, inputs: Inputs, new_tokens: int
) -> FirstCall:
    """Trigger compilation and graph capture; return tokens, peak memory, and router rates."""
    model, device = contender.model(models), models.ours.device
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if is_cuda else 0
    try:
        tokens = generate(contender, model, inputs, new_tokens)
        if is_cuda:
            generate(contender, model, inputs, 1)  # a prefill is captured when its shape recurs
    except torch.OutOfMemoryError as error:
        if contender.label == DENSE:
            raise
        return FirstCall(left_out=_reason(error))
    except Exception as error:
        # Compilation can fail in any way; that must not stop the benchmark of the policies.
        if contender.source is not Source.HF_COMPILED:
            raise
        logger.warning("%s is left out", contender.label, exc_info=error)
        torch.compiler.reset()
        return FirstCall(left_out=_reason(error))
    peak = None
    if is_cuda:
        weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
        peak = torch.cuda.max_memory_allocated(device) - held + weights
    rates = None
    if plan.routed:
        with record_routing(model) as record:
            generate(contender, model, inputs, new_tokens)
        rates = observed_rates(plan, record, new_tokens)
    return FirstCall(tokens, peak, rates)


def _reason(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def agreements_of(
    every: Sequence[Contender], firsts: Mapping[str, FirstCall], dtype: torch.dtype
) -> dict[str, Agreement]:
    """Token agreement with Hugging Face for every contender that should match it.

    Raises:
        BenchError: our dense model does not match in a dtype where it must.
    """
    hf = firsts[HF].tokens if HF in firsts else None
    if hf is None:
        return {}
    found = {}
    for each in every:
        tokens = firsts[each.label].tokens
        if tokens is None or not (each.policy is None or each.label == DENSE):
            continue
        same = (tokens == hf).int().cumprod(1)
        found[each.label] = Agreement(int(same.sum()), same.numel())
    own = found[DENSE]
    if dtype in _EXACT and own.equal < own.of:
        raise BenchError(
            f"dense tokens: {own.equal} of {own.of} match Hugging Face's in {dtype}; allowed: all, "
            "so nothing was timed"
        )
    return found
