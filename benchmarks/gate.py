"""Is a peer correct? Checked before it is timed.

The loop that is timed continues a short prompt. Its logits are compared with those of the masked
oracle, which continues with the same tokens: their error must stay within that of plain
low-precision code (`fastskip.verification.budget`). The cache must hold as many bytes as the plan
claims.
"""

from __future__ import annotations

import copy
import traceback
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
_WIDER = {torch.float32: torch.float64}  # for anything narrower, fp32 is the truth


def faults(models: Models, policies: Mapping[str, SkipPolicy]) -> dict[str, str]:
    """Name -> what is wrong, for each policy under which our model fails or disagrees with the
    oracle."""
    truth, prompt = truth_of(models.hf), _prompt(models.hf)
    found: dict[str, str] = {}
    for name, policy in policies.items():
        try:
            fault = _fault(models, truth, prompt, policy)
        except Exception:  # the other policies are checked anyway
            fault = traceback.format_exc(limit=-6)
        if fault:
            found[name] = fault
    return found


def truth_of(hf: Any) -> Any:
    """Hugging Face's model in a dtype whose rounding is negligible."""
    return copy.deepcopy(hf).to(_WIDER.get(hf.dtype, torch.float32))


def _fault(models: Models, truth: Any, prompt: Prompt, policy: SkipPolicy) -> str | None:
    ours = fastskip.set_policy(models.ours, policy)
    if ours.device.type == "cuda":
        # The first two prompts of a shape run eagerly and are captured; the third is a replay.
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
    # No plan knows what routers leave out of the cache; it can only hold less than claimed.
    is_hollow = any(layer.hollow for layer in plan.layers)
    if held == claimed or (is_hollow and held < claimed):
        return None
    return f"cache: holds {held} bytes, the plan says {claimed}"


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
    """Random embeddings with the standard deviation of the model's own."""
    classes = [TokenClass.TEXT] * TEXT_BEFORE + [TokenClass.IMAGE] * IMAGE_ROWS
    classes += [TokenClass.TEXT] * TEXT_AFTER
    codes = torch.tensor([[CODES[token_class] for token_class in classes]])
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*codes.shape, table.shape[1], generator=generator)
    embeddings = (noise * table.float().std().cpu()).to(table.dtype)
    mask = torch.ones_like(codes)
    return Prompt(*(x.to(table.device) for x in (embeddings, mask, codes)))  # type: ignore[arg-type]
