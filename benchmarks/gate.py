"""Is a peer right? Asked before it is timed.

A short prompt is continued by the loop that is timed. Its scores are compared with those of the
masked oracle, which continues the same tokens: they may err by what plain low-precision code errs
by (`fastskip.verification.budget`). The cache must hold as many bytes as the plan claims.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fastskip
from benchmarks.shapes import Models
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.tokens import CODES
from fastskip.verification.budget import measure
from fastskip.verification.oracle import MaskedOracle, Prompt

IMAGE_ROWS, TEXT_BEFORE, TEXT_AFTER, NEW = 24, 4, 8, 4
Decided = Mapping[tuple[int, str], Tensor]
_WIDER = {torch.float32: torch.float64}  # the truth of anything narrower is in fp32


def faults(models: Models, policies: Mapping[str, SkipPolicy]) -> dict[str, str]:
    """Name -> what is wrong, of the policies under which our model is not what the oracle is."""
    truth, prompt = truth_of(models.hf), _prompt(models.hf)
    found = {name: _fault(models, truth, prompt, policy) for name, policy in policies.items()}
    return {name: fault for name, fault in found.items() if fault}


def truth_of(hf: Any) -> Any:
    """Hugging Face's model in a dtype whose rounding does not count."""
    return copy.deepcopy(hf).to(_WIDER.get(hf.dtype, torch.float32))


def _fault(models: Models, truth: Any, prompt: Prompt, policy: SkipPolicy) -> str | None:
    ours = fastskip.set_policy(models.ours, policy)
    if ours.device.type == "cuda":
        # The first two prompts of a shape are launched one by one and captured.
        for seed in (1, 2):
            _generate(ours, _prompt(models.hf, seed))
    with fastskip.record_routing(ours) as record:
        out = _generate(ours, prompt)
    decisions = {key: mask.to(ours.device) for key, mask in record.all_skipped().items()}
    logits = torch.stack(out.logits, dim=1).to(ours.dtype)
    eager, exact = (
        _continue(model, policy, decisions, prompt, out.sequences[:, :-1])
        for model in (models.hf, truth)
    )
    budget = measure("scores", logits, eager, exact)
    if not budget.holds:
        return str(budget)
    held, plan = out[CACHE_NAME].live_bytes(), fastskip.plan_of(ours)
    claimed = plan.kv_bytes(IMAGE_ROWS, TEXT_BEFORE + TEXT_AFTER, NEW - 1)
    # What routers leave out of a cache no plan knows; it cannot be more than all.
    is_hollow = any(layer.hollow for layer in plan.layers)
    if held == claimed or (is_hollow and held < claimed):
        return None
    return f"cache: {held} bytes are held, the plan says {claimed}"


def _generate(model: Any, prompt: Prompt) -> Any:
    return model.generate(
        inputs_embeds=prompt.embeddings,
        attention_mask=prompt.attention_mask,
        token_classes=prompt.token_classes,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _continue(
    model: Any, policy: SkipPolicy, decisions: Decided, prompt: Prompt, tokens: Tensor
) -> Tensor:
    prompt = prompt._replace(embeddings=prompt.embeddings.to(model.dtype))
    with MaskedOracle(model, policy.to_dict(), decisions) as oracle:
        return oracle.continuation(prompt, tokens)


def _prompt(model: Any, seed: int = 0) -> Prompt:
    """Random embeddings of the size that the model's own have."""
    classes = [TokenClass.TEXT] * TEXT_BEFORE + [TokenClass.IMAGE] * IMAGE_ROWS
    classes += [TokenClass.TEXT] * TEXT_AFTER
    codes = torch.tensor([[CODES[token_class] for token_class in classes]])
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*codes.shape, table.shape[1], generator=generator)
    embeddings = (noise * table.float().std().cpu()).to(table.dtype)
    mask = torch.ones_like(codes)
    return Prompt(*(x.to(table.device) for x in (embeddings, mask, codes)))  # type: ignore[arg-type]
