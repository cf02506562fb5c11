"""How far a policy moves a model's answers, by teacher forcing on the dense model's answers.

The dense model answers each item once. Its answers are then appended to their prompts, and a policy
is judged by the distributions that it gives for their tokens in one forward. Rows of an answer are
GENERATED, as they would be in `generate`, so that nothing needs to be generated again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.families import DEEP_INPUTS, logits_of, placeholders, text_model_of
from fastskip.loading import plan_of, set_policy
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.study.calls import end_tokens, in_answers, placed
from fastskip.study.evaluation.exam import Exam
from fastskip.tokens import CODES


class NonFiniteError(ValueError):
    """A policy under which the model's log probabilities are not finite."""


@dataclass(frozen=True, slots=True)
class AnswerShift:
    """How far a policy moves the answers, as means over answer tokens.

    `kl`: divergence of its distributions from the dense model's, nats. `loss`: negative log
    likelihood of the dense model's answers, nats.
    """

    kl: float
    loss: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts and dense answers `[B, T]`, embedded; logits are taken at the last `n` columns.

    `inputs`: of the text model; `logs [B, n, V]`: the dense model's log probabilities;
    `answers [B, n]`: its tokens; `is_answer [B, n]`: which of them belong to an answer.
    """

    inputs: dict[str, Any]
    logs: Tensor
    answers: Tensor
    is_answer: Tensor


class Calibrator:
    """A prepared model, and items answered by it when dense."""

    def __init__(self, model: Any, exam: Exam) -> None:
        """Generates the dense model's answers; restores the model's policy.

        Keeps `V` numbers per answer token, on the model's device.

        Args:
            model: a prepared one.
            exam: the items, run in the exam's batches.
        """
        self.model, self.exam = model, exam
        before = plan_of(model).policy
        try:
            set_policy(model, SkipPolicy())
            self._batches = []
            for number in range(len(exam)):
                self._batches.append(_answered(model, placed(exam.inputs(number), model), exam))
        finally:
            set_policy(model, before)

    def __len__(self) -> int:
        """The number of answer tokens."""
        return sum(int(batch.is_answer.sum()) for batch in self._batches)

    @torch.inference_mode()
    def moved(self, policy: SkipPolicy) -> AnswerShift:
        """How far a policy moves the answers; the model keeps this policy.

        Raises:
            NonFiniteError: the model overflows under it.
        """
        set_policy(self.model, policy)
        divergence = loss = 0.0
        for batch in self._batches:
            logs = _logs(self.model, batch)
            kl = F.kl_div(logs, batch.logs, reduction="none", log_target=True).sum(-1)
            nll = -logs.gather(-1, batch.answers[..., None]).squeeze(-1)
            divergence += float(kl[batch.is_answer].double().sum())
            loss += float(nll[batch.is_answer].double().sum())
        if not math.isfinite(divergence + loss):
            problem = f"policy {policy.name!r}: log probabilities are not finite"
            allowed = "a dtype in which the model does not overflow, such as float32"
            raise NonFiniteError(f"{problem} in {self.model.dtype}; allowed: {allowed}")
        count = len(self)
        return AnswerShift(max(0.0, divergence / count), loss / count)


@torch.inference_mode()
def _answered(model: Any, inputs: dict[str, Any], exam: Exam) -> _Batch:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=exam.new_tokens)
    answers = out[:, ids.shape[1] :]
    is_answer = in_answers(answers, end_tokens(model))
    # The last token is predicted but never fed: what follows it is not part of the answer.
    whole = torch.cat([mask, is_answer[:, 1:].to(mask.dtype)], 1)
    codes = _codes(model, ids, inputs, answers.shape[1] - 1)
    given = _continued(_embedded(model, inputs), model.get_input_embeddings()(answers[:, :-1]))
    # Unlike `generate`, a forward counts pads as positions, and random routers draw by position.
    positions, axes = (whole.cumsum(1) - 1).clamp(min=0), given.get("position_ids")
    given["position_ids"] = positions if axes is None else torch.cat([positions[None], axes])
    given |= {"attention_mask": whole, "token_classes": codes, "use_cache": False}
    # Only the columns that predict answer tokens need logits.
    predicting = torch.arange(ids.shape[1] - 1, whole.shape[1])
    given["kept_columns"] = predicting.expand(len(ids), -1)
    empty = answers.new_zeros(0, dtype=torch.float32)
    batch = _Batch(given, empty, answers, is_answer)
    return replace(batch, logs=_logs(model, batch))


def _embedded(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Prompts as the text model reads them: `inputs_embeds [B, P, D]` with image features merged
    in, and, if the model has them, positions in time, height and width and the features that are
    added after the first layers."""
    seen: dict[str, Any] = {}
    hook = text_model_of(model).register_forward_pre_hook(
        lambda _, args, given: seen.update(given), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    found = {name: seen[name] for name in DEEP_INPUTS if seen.get(name) is not None}
    found["inputs_embeds"] = seen.get("inputs_embeds")
    if found["inputs_embeds"] is None:  # a text-only model's decoder embeds its own inputs
        found["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    positions: Tensor | None = seen.get("position_ids")
    if positions is not None and positions.ndim == 3:
        found["position_ids"] = positions[-3:]
    return found


def _continued(prompts: dict[str, Any], answers: Tensor) -> dict[str, Any]:
    """The prompts, which are padded on the left, with answers `[B, n, D]` appended."""
    found = {**prompts, "inputs_embeds": torch.cat([prompts["inputs_embeds"], answers], 1)}
    axes, new = prompts.get("position_ids"), answers.shape[1]
    if axes is not None:
        later = torch.arange(1, new + 1, device=axes.device)
        found["position_ids"] = torch.cat([axes, axes[:, :, -1:] + later], 2)
    columns, _ = DEEP_INPUTS
    if columns in prompts:
        found[columns] = F.pad(prompts[columns], (0, new))
    return found


def _logs(model: Any, batch: _Batch) -> Tensor:
    """Log probabilities `[B, n, V]` (fp32) at every answer token."""
    rows = text_model_of(model)(**batch.inputs).last_hidden_state
    return F.log_softmax(logits_of(model, rows).float(), dim=-1)


def _codes(model: Any, ids: Tensor, inputs: dict[str, Any], more: int) -> Tensor:
    """Class codes `[B, T + more]` of prompts and the answers appended to them."""
    is_image = placeholders(model.config, ids) & any("pixel_values" in name for name in inputs)
    codes = torch.where(is_image, CODES[TokenClass.IMAGE], CODES[TokenClass.TEXT])
    return F.pad(codes, (0, more), value=CODES[TokenClass.GENERATED])
