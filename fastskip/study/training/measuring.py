"""What skipping does to training: the time of a step against dense, losses, routers' skip rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from fastskip.loading import plan_of, record_routing, set_policy
from fastskip.policy import SkipPolicy
from fastskip.prompts.conversations import DataError, Example
from fastskip.study.training.batches import Collator
from fastskip.study.training.encoding import IGNORED, Encoder, Features
from fastskip.study.training.events import now
from fastskip.study.training.parts import learning, names_of
from fastskip.study.training.settings import Parts, Precision, Settings
from fastskip.study.training.sources import Stream
from fastskip.timing import rotated


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Median seconds of one forward (loss included) and one backward."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same batches under the policy and dense, interleaved, `rounds` times each."""

    policy: PassTimes
    dense: PassTimes
    rounds: int
    batches: int

    @property
    def speed_up(self) -> float:
        """Of forward and backward together."""
        return self.dense.both / self.policy.both


def batches_of(
    data: Sequence[Example],
    processor: Any,
    settings: Settings,
    count: int,
    max_tokens: int | None = None,
) -> list[Features]:
    """The first ``count`` batches of the data, in order; fewer if the data end before.

    ``max_tokens``: longer examples cannot be used.

    Raises:
        DataError: an example cannot be used, and ``settings.skip_broken`` is not set; or none can.
    """
    usable = Stream(data, Encoder(processor, max_tokens), skip_broken=settings.skip_broken)
    pad_id = getattr(processor, "tokenizer", processor).pad_token_id
    collate = Collator(pad_id, settings.padding)
    encoded = iter(usable)
    batches = (list(islice(encoded, settings.batch)) for _ in range(count))
    found = [collate(batch) for batch in batches if batch]
    if not found:
        reasons = list(usable.broken.values())[:1]
        raise DataError("; ".join(["data: no example can be used", *reasons]))
    return found


def compare_dense(
    model: Any, batches: Sequence[Features], settings: Settings, rounds: int = 5
) -> Comparison:
    """Times forward and backward of a prepared model under its policy and dense, interleaved.

    Weights do not change. With ``Parts.LORA``, the adapters that the model has are what learns. In
    training, routers compute every candidate, so there only the policy's other skips save time.
    """
    policy = plan_of(model).policy
    contenders = {"policy": policy, "dense": SkipPolicy()}
    names = names_of(model, settings.parts)
    if settings.parts is Parts.LORA:
        names = frozenset(name for name, _ in model.named_parameters() if "lora_" in name)
    was_training = model.training
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    try:
        with learning(model, names, settings.precision):
            model.train()
            for number in range(rounds + 1):  # the first one is a warm-up
                for name in rotated(list(contenders), number):
                    set_policy(model, contenders[name])
                    times = [_timed(model, batch, settings.precision) for batch in batches]
                    if number:
                        forward, backward = map(statistics.fmean, zip(*times, strict=True))
                        found[name].append((forward, backward))
    finally:
        set_policy(model, policy)
        model.train(was_training)
    medians = {
        name: PassTimes(*(statistics.median(part) for part in zip(*each, strict=True)))
        for name, each in found.items()
    }
    return Comparison(medians["policy"], medians["dense"], rounds, len(batches))


@torch.no_grad()
def held_out_loss(model: Any, batches: Sequence[Features]) -> float:
    """The mean loss over the answer tokens of all batches, under the model's policy."""
    total, count = 0.0, 0
    for batch in batches:
        # Nothing predicts the first token of a sequence.
        own = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += own * float(model(**_placed(batch, model), use_cache=False).loss)
        count += own
    return total / count


def skipped_shares(model: Any, batches: Sequence[Features]) -> dict[int, float]:
    """The share of candidates that skip under teacher forcing, by layer; key -1: all layers."""
    candidates: dict[int, int] = {}
    skipped: dict[int, int] = {}
    with torch.no_grad(), record_routing(model) as record:
        for batch in batches:
            model(**_placed(batch, model), use_cache=False)
    for forward in record.forwards:
        for (layer, _), mask in forward.candidates.items():
            for key in (layer, -1):
                candidates[key] = candidates.get(key, 0) + int(mask.sum())
        for (layer, _), mask in forward.skipped.items():
            for key in (layer, -1):
                skipped[key] = skipped.get(key, 0) + int(mask.sum())
    return {key: skipped.get(key, 0) / count for key, count in sorted(candidates.items()) if count}


def _timed(model: Any, batch: Features, precision: Precision) -> tuple[float, float]:
    placed, device = _placed(batch, model), model.device.type
    is_half = precision is Precision.BFLOAT16
    with torch.autocast(device, torch.bfloat16) if is_half else nullcontext():
        began = now(model)
        loss = model(**placed, use_cache=False).loss
        middle = now(model)
    if loss.requires_grad:
        loss.backward()
    ended = now(model)
    model.zero_grad(set_to_none=True)
    return middle - began, ended - middle


def _placed(batch: Features, model: Any) -> Features:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
