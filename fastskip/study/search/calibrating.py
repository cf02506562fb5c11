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

from fastskip.families import image_token_ids
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

    `logs [B, n, V]`: the dense model's log probabilities; `told [B, n]`: its tokens;
    `asked [B, n]`: which of them are part of an answer; `axes [3, B, T]`: where rows stand, of a
    model that tells time, height and width apart.
    """

    embeddings: Tensor
    mask: Tensor
    codes: Tensor
    logs: Tensor
    told: Tensor
    asked: Tensor
    axes: Tensor | None


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
    prompts, axes = _embedded(model, inputs)
    embeddings = torch.cat([prompts, model.get_input_embeddings()(told[:, :-1])], 1)
    if axes is not None:  # prompts are padded on the left: answers follow on from the last column
        later = torch.arange(1, told.shape[1], device=axes.device)
        axes = torch.cat([axes, axes[:, :, -1:] + later], 2)
    empty = told.new_zeros(0, dtype=torch.float32)
    batch = _Batch(embeddings, whole, codes, empty, told, asked, axes)
    return replace(batch, logs=_logs(model, batch))


def _embedded(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Prompts `[B, P, D]` as the decoder reads them, image features in their places; and where
    they stand in time, height and width, if the model asks."""
    seen: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, given: seen.update(given), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    found: Tensor | None = seen.get("inputs_embeds")
    if found is None:  # a text-only model's decoder embeds by itself
        found = model.get_input_embeddings()(inputs["input_ids"])
    positions: Tensor | None = seen.get("position_ids")
    if positions is None or positions.ndim != 3:
        return found, None
    return found, positions[-3:]


def _logs(model: Any, batch: _Batch) -> Tensor:
    """Log probabilities `[B, n, V]` (fp32) of every token of the answers."""
    out = model(
        inputs_embeds=batch.embeddings,
        attention_mask=batch.mask,
        token_classes=batch.codes,
        use_cache=False,
        logits_to_keep=batch.told.shape[1],
        position_ids=batch.axes,
    )
    return F.log_softmax(out.logits.float(), dim=-1)


def _codes(model: Any, ids: Tensor, inputs: dict[str, Any], more: int) -> Tensor:
    """Class codes `[B, T + more]` of prompts and of the answers behind them."""
    images = torch.tensor(image_token_ids(model.config), device=ids.device, dtype=ids.dtype)
    is_image = torch.isin(ids, images) & any("pixel_values" in name for name in inputs)
    codes = torch.where(is_image, CODES[TokenClass.IMAGE], CODES[TokenClass.TEXT])
    return F.pad(codes, (0, more), value=CODES[TokenClass.GENERATED])


def _lives(told: Tensor, model: Any) -> Tensor:
    """Which answer tokens `[B, n]` come before the end of the answer, or are it."""
    ends = torch.tensor(sorted(end_tokens(model)), device=told.device, dtype=told.dtype)
    ended = torch.isin(told, ends)
    return ended.cumsum(1) - ended.long() == 0
