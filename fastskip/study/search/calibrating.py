"""How far a policy moves a model's answers: told the dense model's own, token by token.

The dense model answers each item once. Then its answers are put behind their prompts, and a policy
is judged by the distributions that it gives for each of their tokens in one forward: the rows of an
answer are GENERATED, as they would be in `generate`, so that nothing needs to be generated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.families import DEEP_INPUTS, placeholders, text_model_of
from fastskip.loading import plan_of, set_policy
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.study.agreement import end_tokens
from fastskip.study.evaluation import Exam
from fastskip.study.samples import placed
from fastskip.tokens import CODES


class MovedError(ValueError):
    """A policy under which a model gives no numbers."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What a policy does to the answers, means over answer tokens.

    `kl`: divergence of its distributions from the dense model's, nats. `loss`: how surprised it is
    by the dense model's answers (negative log likelihood), nats.
    """

    kl: float
    loss: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts and dense answers `[B, T]`, embedded; what is asked are the last `n` columns.

    `inputs`: what the text model takes; `logs [B, n, V]`: the dense model's log probabilities;
    `told [B, n]`: its tokens; `asked [B, n]`: which of them are part of an answer.
    """

    inputs: dict[str, Any]
    logs: Tensor
    told: Tensor
    asked: Tensor


class Calibrator:
    """A prepared model, and items answered by its dense form."""

    def __init__(
        self, model: Any, exam: Exam, on_batch: Callable[[], object] = lambda: None
    ) -> None:
        """Lets the dense model answer; leaves the model's policy as it was.

        Keeps `V` numbers an answer token, where the model is.

        Args:
            model: a prepared one.
            exam: the items; its batches are what runs at once.
            on_batch: called after each batch.
        """
        self.model, self.exam = model, exam
        before = plan_of(model).policy
        try:
            set_policy(model, SkipPolicy())
            self._batches = []
            for number in range(len(exam)):
                self._batches.append(_answered(model, placed(exam.inputs(number), model), exam))
                on_batch()
        finally:
            set_policy(model, before)

    def __len__(self) -> int:
        """The number of answer tokens."""
        return sum(int(batch.asked.sum()) for batch in self._batches)

    @torch.inference_mode()
    def moved(self, policy: SkipPolicy) -> Moved:
        """How far a policy moves the answers; leaves the model under it.

        Raises:
            MovedError: the model overflows under it.
        """
        set_policy(self.model, policy)
        divergence = loss = 0.0
        for batch in self._batches:
            logs = _logs(self.model, batch)
            kl = F.kl_div(logs, batch.logs, reduction="none", log_target=True).sum(-1)
            told = -logs.gather(-1, batch.told[..., None]).squeeze(-1)
            divergence += float(kl[batch.asked].double().sum())
            loss += float(told[batch.asked].double().sum())
        if not math.isfinite(divergence + loss):
            problem = f"policy {policy.name!r}: log probabilities that are not finite"
            allowed = "a dtype in which the model does not overflow, such as float32"
            raise MovedError(f"{problem} in {self.model.dtype}; allowed: {allowed}")
        count = len(self)
        return Moved(max(0.0, divergence / count), loss / count)


@torch.inference_mode()
def _answered(model: Any, inputs: dict[str, Any], exam: Exam) -> _Batch:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=exam.new_tokens)
    told = out[:, ids.shape[1] :]
    asked = _lives(told, model)
    # The last token is asked for and never fed: what it would lead to is no part of the answer.
    whole = torch.cat([mask, asked[:, 1:].to(mask.dtype)], 1)
    codes = _codes(model, ids, inputs, told.shape[1] - 1)
    given = _continued(_embedded(model, inputs), model.get_input_embeddings()(told[:, :-1]))
    # A forward counts pads as positions, which `generate` does not; draws go by positions.
    positions, axes = (whole.cumsum(1) - 1).clamp(min=0), given.get("position_ids")
    given["position_ids"] = positions if axes is None else torch.cat([positions[None], axes])
    given |= {"attention_mask": whole, "token_classes": codes, "use_cache": False}
    # Of the columns of the answers alone the logits are asked for.
    asking = torch.arange(ids.shape[1] - 1, whole.shape[1])
    given["kept_columns"] = asking.expand(len(ids), -1)
    empty = told.new_zeros(0, dtype=torch.float32)
    batch = _Batch(given, empty, told, asked)
    return replace(batch, logs=_logs(model, batch))


def _embedded(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Prompts as the text model reads them: `inputs_embeds [B, P, D]` with image features in their
    places; where they stand in time, height and width, and what enters behind the first layers, if
    the model has such."""
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
    if found["inputs_embeds"] is None:  # a text-only model's decoder embeds by itself
        found["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    positions: Tensor | None = seen.get("position_ids")
    if positions is not None and positions.ndim == 3:
        found["position_ids"] = positions[-3:]
    return found


def _continued(prompts: dict[str, Any], answers: Tensor) -> dict[str, Any]:
    """The same with answers `[B, n, D]` behind the prompts, which are padded on the left."""
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
    """Log probabilities `[B, n, V]` (fp32) of every token of the answers."""
    rows = text_model_of(model)(**batch.inputs).last_hidden_state
    return F.log_softmax(model.get_output_embeddings()(rows).float(), dim=-1)


def _codes(model: Any, ids: Tensor, inputs: dict[str, Any], more: int) -> Tensor:
    """Class codes `[B, T + more]` of prompts and of the answers behind them."""
    is_image = placeholders(model.config, ids) & any("pixel_values" in name for name in inputs)
    codes = torch.where(is_image, CODES[TokenClass.IMAGE], CODES[TokenClass.TEXT])
    return F.pad(codes, (0, more), value=CODES[TokenClass.GENERATED])


def _lives(told: Tensor, model: Any) -> Tensor:
    """Which answer tokens `[B, n]` come before the end of the answer, or are it."""
    ends = torch.tensor(sorted(end_tokens(model)), device=told.device, dtype=told.dtype)
    ended = torch.isin(told, ends)
    return ended.cumsum(1) - ended.long() == 0
