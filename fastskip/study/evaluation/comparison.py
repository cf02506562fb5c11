"""Compare models on the same items: a larger one that skips, and smaller ones, at which compute.

This is the question that "Skipping Computations in Multimodal LLMs" raises: does a larger model
that skips computation beat a smaller one at equal compute? Works for any checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from fastskip.families import image_token_ids, text_model_of
from fastskip.intervals import Estimate
from fastskip.loading import plan_of
from fastskip.study.calls import placed
from fastskip.study.counts import check_counts
from fastskip.study.evaluation.answers import Evaluation
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.item_inputs import ItemInputs
from fastskip.study.evaluation.items import Item
from fastskip.study.evaluation.metrics import scale_of
from fastskip.timing import endless, time_once
from fastskip.wording import Scale


@dataclass(frozen=True, slots=True)
class Contender:
    """A model to compare: `load` returns it, prepared, with its processor. Loaded one at a time."""

    label: str
    load: Callable[[], tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Compared:
    """One contender, measured.

    `parameters`: of the language model. `scores`: by kind of item, plus "all", on `scale`.
    `changes`: paired differences from the first contender, item by item; empty for the first.
    `flops`, `kv_bytes`, `ttft_s` and `tpot_s`: for the first item at batch 1 with `new_tokens`
    tokens; FLOPs cover the decoder and lm_head, TTFT includes the vision tower.
    """

    label: str
    parameters: int
    scale: Scale
    scores: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]
    new_tokens: int
    flops: int
    kv_bytes: int
    ttft_s: float
    tpot_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


ALL = "all"


def compare(
    contenders: Sequence[Contender],
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    answer_tokens: int = 32,
    new_tokens: int = 16,
    rounds: int = 5,
    on_model: Callable[[str], object] = lambda label: None,
) -> tuple[Compared, ...]:
    """Have every contender answer all items, then time it; the first is the baseline.

    Args:
        contenders: at least one.
        items: the questions; compute and times are measured on the first.
        batch_size: prompts per batch, for the scores.
        answer_tokens: maximum number of tokens per answer.
        new_tokens: how many tokens the timed runs generate.
        rounds: timed runs per contender; medians are reported.
        on_model: called with the label of each contender before it is loaded.
    Raises:
        ValueError: there are no contenders, or `rounds` or `new_tokens` is too small.
        ItemError: an item cannot be used.
        ScaleError: some items are judged by CIDEr and others are not.
    """
    check_counts(
        ValueError,
        contenders=(len(contenders), 1),
        rounds=(rounds, 1),
        new_tokens=(new_tokens, 2),
    )
    scale_of(item.metric for item in items)  # before anything is loaded
    found: list[Compared] = []
    first: Evaluation | None = None
    for each in contenders:
        on_model(each.label)
        model, processor = each.load()
        exam = Exam(
            items,
            processor,
            config=model.config,
            batch_size=batch_size,
            new_tokens=answer_tokens,
            max_cache_bytes=0,
        )
        evaluation = exam.take(model)
        inputs = ItemInputs(processor, model.config, new_tokens, max_cache_bytes=0).build(items[:1])
        found.append(_measured(each.label, model, inputs, evaluation, first, new_tokens, rounds))
        first = first or evaluation
        del model
    return tuple(found)


def prompt_sizes(inputs: Mapping[str, Any], config: Any) -> tuple[int, int, int]:
    """Of the first prompt: image rows, text rows, and text rows before the first image."""
    is_image = torch.isin(
        inputs["input_ids"][0].cpu(), torch.tensor(image_token_ids(config), dtype=torch.int64)
    )
    n_image = int(is_image.sum())
    return n_image, len(is_image) - n_image, int(is_image.int().argmax())


def _measured(
    label: str,
    model: Any,
    single: Mapping[str, Any],
    evaluation: Evaluation,
    first: Evaluation | None,
    new_tokens: int,
    rounds: int,
) -> Compared:
    inputs = placed(single, model)
    n_image, n_text, before = prompt_sizes(inputs, model.config)
    plan = plan_of(model)
    with endless(model):
        times = [time_once(model, inputs, new_tokens) for _ in range(rounds)]
    kinds: dict[str, tuple[str, ...]] = {ALL: (), **{kind: (kind,) for kind in evaluation.kinds}}
    return Compared(
        label=label,
        parameters=sum(p.numel() for p in text_model_of(model).parameters()),
        scale=scale_of(each.metric for each in evaluation.judged),
        scores={name: evaluation.estimate(*kind) for name, kind in kinds.items()},
        changes={}
        if first is None
        else {name: evaluation.minus(first, *kind) for name, kind in kinds.items()},
        new_tokens=new_tokens,
        flops=plan.flops(n_image, n_text, new_tokens, text_before=before),
        kv_bytes=plan.kv_bytes(n_image, n_text, new_tokens - 1),
        ttft_s=median(each.ttft for each in times),
        tpot_s=median(each.decode for each in times),
    )
