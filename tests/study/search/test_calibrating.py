"""Answers that are told in one forward, against `generate` that is made to say the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import fastskip
from fastskip.policy import RouterRule, SkipPolicy
from fastskip.study.search.calibrating import Calibrator
from tests.batches import random_batch
from tests.models import Kind, tiny_llava

POLICIES = {
    "generated rows skip": SkipPolicy.preset("every_nth_block", scope="generated", kv="omit"),
    "image rows leave": SkipPolicy.preset("visual_withdrawal", after=1),
    "rows are drawn": SkipPolicy(routers=(RouterRule("1:3", skip="ffn", kind="random", rate=0.4),)),
}


class OneBatch:
    """An exam of padded prompts, of which only inputs are wanted."""

    new_tokens = 5

    def __init__(self, model: Any) -> None:
        self._inputs = random_batch(model, images=(2, 0, 1), seed=3, extra_columns=2).inputs()

    def __len__(self) -> int:
        return 1

    def inputs(self, number: int) -> Any:
        return self._inputs


class Told(LogitsProcessor):
    """Nothing but the tokens `[B, n]` can be said behind a prompt."""

    def __init__(self, tokens: Tensor, width: int) -> None:
        self.tokens, self.width = tokens, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        place = input_ids.shape[1] - self.width
        only = torch.full_like(scores, -1e9)
        return only.scatter(1, self.tokens[:, place : place + 1], 0.0)


@pytest.mark.parametrize("kind", ["llava", "llava_opt", "qwen2_vl"])
@pytest.mark.parametrize("name", POLICIES)
def test_surprise_is_that_of_generate(kind: Kind, name: str) -> None:
    model: Any = fastskip.apply_(tiny_llava(kind), "dense")
    model.generation_config.eos_token_id = None
    exam: Any = OneBatch(model)
    calibrator = Calibrator(model, exam)
    inputs = exam.inputs(0)
    width = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": exam.new_tokens}
    told = model.generate(**inputs, **options)[:, width:]
    found = calibrator.moved(POLICIES[name])
    out = model.generate(
        **inputs,
        **options,
        logits_processor=LogitsProcessorList([Told(told, width)]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logs = torch.stack(out.logits, 1).float().log_softmax(-1)
    surprise = -logs.gather(-1, told[..., None]).mean()
    assert found.kl > 0 and found.loss == pytest.approx(float(surprise), rel=1e-4)
