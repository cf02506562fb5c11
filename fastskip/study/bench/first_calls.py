"""First calls: what compiles and captures, whether tokens are right, and what is told but once."""

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
from fastskip.study.seen_rates import Rates, seen_rates

logger = logging.getLogger(__name__)
_EXACT = (torch.float32, torch.float64)
"""What greedy tokens must be equal in; narrower numbers round near-ties to either side."""


@dataclass(frozen=True, slots=True)
class FirstCall:
    """What a contender's first call told.

    `rates`: in the prompt and in the steps, of a policy with routers. `left_out`: why it cannot be
    timed; then there is nothing else.
    """

    tokens: Tensor | None = None
    peak_bytes: int | None = None
    rates: tuple[Rates, Rates] | None = None
    left_out: str | None = None


def first_call(
    contender: Contender, models: Models, plan: SkipPlan, inputs: Inputs, new_tokens: int
) -> FirstCall:
    """Compiles and captures; tells tokens, memory, and what routers decide."""
    model, device = contender.model(models), models.ours.device
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if is_cuda else 0
    try:
        tokens = generate(contender, model, inputs, new_tokens)
        if is_cuda:
            generate(contender, model, inputs, 1)  # prompts are captured when they come again
    except torch.OutOfMemoryError as error:
        if contender.label == DENSE:
            raise
        return FirstCall(left_out=_reason(error))
    except Exception as error:
        # A compiler can fail in any way, and Hugging Face's is no fault of a policy.
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
        rates = seen_rates(plan, record, new_tokens)
    return FirstCall(tokens, peak, rates)


def _reason(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def agreements_of(
    every: Sequence[Contender], firsts: Mapping[str, FirstCall], dtype: torch.dtype
) -> dict[str, Agreement]:
    """What should give Hugging Face's tokens, compared with them.

    Raises:
        BenchError: our dense model does not, where rounding is no excuse.
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
            f"dense tokens: {own.equal} of {own.of} are Hugging Face's, in {dtype}; needed: all, "
            "so nothing was timed"
        )
    return found
