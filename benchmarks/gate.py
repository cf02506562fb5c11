"""Is a peer right? Asked before it is timed.

Two short prompts, one with pads, are continued by the loop that is timed. Its scores are compared
with those of the masked oracle, which continues the same tokens: they may err by what plain
low-precision code errs by (`fastskip.verification.budget`). The cache must hold as many bytes as
the plan claims.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

import fastskip
from benchmarks.shapes import Models
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.tokens import CODES
from fastskip.verification.budget import measure
from fastskip.verification.oracle import MaskedOracle, Prompt

IMAGE_ROWS, TEXT_BEFORE, TEXT_AFTER, PADS, NEW = 24, 4, 12, 3, 4
_WIDER = {torch.float32: torch.float64}


class GateError(AssertionError):
    """A peer that computes something else than its policy says."""


@dataclass(frozen=True)
class Gate:
    """Checks policies on one model; `truth` is the model in a higher precision."""

    models: Models
    truth: Any
    prompt: Prompt

    @classmethod
    def of(cls, models: Models) -> Gate:
        hf = models.hf
        return cls(models, copy.deepcopy(hf).to(_WIDER.get(hf.dtype, torch.float32)), _prompt(hf))

    def check(self, policy: SkipPolicy) -> None:
        """Raise `GateError` unless our model does under `policy` what the oracle does."""
        ours = fastskip.set_policy(self.models.ours, policy)
        embeddings, mask, classes = self.prompt
        out = ours.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            token_classes=classes,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(out.logits, dim=1).to(ours.dtype)
        eager, truth = (
            self._continue(model, policy, out.sequences[:, :-1])
            for model in (self.models.hf, self.truth)
        )
        budget = measure("scores", logits, eager, truth)
        if not budget.holds:
            raise GateError(str(budget))
        claimed = sum(
            fastskip.plan_of(ours).kv_bytes(IMAGE_ROWS, TEXT_BEFORE + TEXT_AFTER - pads, NEW - 1)
            for pads in (0, PADS)
        )
        if out.past_key_values.live_bytes() != claimed:
            held = out.past_key_values.live_bytes()
            raise GateError(f"the cache holds {held} bytes, the plan says {claimed}")

    def _continue(self, model: Any, policy: SkipPolicy, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = self.prompt.embeddings.to(model.dtype)
        with MaskedOracle(model, policy.to_dict()) as oracle:
            return oracle.continuation(self.prompt._replace(embeddings=embeddings), tokens)


def _prompt(model: Any) -> Prompt:
    """Two prompts, the second with pads on the left; image rows are noise."""
    classes = [TokenClass.TEXT] * TEXT_BEFORE + [TokenClass.IMAGE] * IMAGE_ROWS
    classes += [TokenClass.TEXT] * TEXT_AFTER
    codes = torch.tensor([[CODES[token_class] for token_class in classes]] * 2)
    mask = torch.ones_like(codes)
    mask[1, :PADS] = 0
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*codes.shape, table.shape[1], generator=generator)
    embeddings = (noise * table.float().std().cpu()).to(table.dtype)
    return Prompt(*(tensor.to(table.device) for tensor in (embeddings, mask, codes)))
