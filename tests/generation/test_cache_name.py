"""The name of a cache: that of the installed transformers everywhere, and the old one as well."""

import copy
import inspect
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import fastskip
from fastskip.families import text_model_of
from fastskip.generation.cache_name import CACHE_NAME, OLD_NAME
from tests.agreement import Trio
from tests.batches import random_batch
from tests.continuing import CACHE_POLICIES, Continued, some_tokens
from tests.models import Kind, tiny_llama, tiny_llava, tiny_opt

KINDS: tuple[Kind, ...] = ("llava", "llava_next_mistral", "llava_onevision", "llava_opt")
TEXT_ONLY: dict[str, Any] = {"llama": tiny_llama, "opt": tiny_opt}
OUTPUTS = (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenerateDecoderOnlyOutput,
    GenerateBeamDecoderOnlyOutput,
)


@pytest.fixture(scope="module", params=["llava", "llava_opt"])
def case(request: pytest.FixtureRequest) -> Continued:
    trio = Trio(tiny_llava(request.param))
    return Continued(trio, CACHE_POLICIES["mixed"], random_batch(trio.plain, images=(2, 0, 1)))


@pytest.mark.parametrize("kind", [*KINDS, *TEXT_ONLY])
def test_forwards_take_it(kind: Any) -> None:
    model: Any = TEXT_ONLY[kind]() if kind in TEXT_ONLY else tiny_llava(kind)
    for each in (model, fastskip.apply_(copy.deepcopy(model))):
        for module in (each, each.model, text_model_of(each)):
            assert CACHE_NAME in inspect.signature(module.forward).parameters
        outputs = each(torch.tensor([[1, 2, 3]]))
        assert CACHE_NAME in list(outputs)


def test_generation_takes_and_returns_it() -> None:
    prepare = GenerationMixin.prepare_inputs_for_generation
    assert CACHE_NAME in inspect.signature(prepare).parameters
    for output in OUTPUTS:
        assert CACHE_NAME in [field.name for field in fields(output)]


def forward(case: Continued, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = case.model(**given).logits
    return logits


def text_forward(case: Continued, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = text_model_of(case.model)(**given).last_hidden_state
    return hidden


def generate(case: Continued, given: dict[str, Any]) -> Tensor:
    tokens: Tensor = case.model.generate(**given, max_new_tokens=4)
    return tokens


@pytest.mark.parametrize("call", [forward, text_forward, generate])
def test_the_old_name_says_the_same(case: Continued, call: Any) -> None:
    """With one warning where it is old, and without any by the name of today."""
    cache, tokens = case.fill(), some_tokens(case.batch, 3)
    answers, warned = [], []
    for name in (CACHE_NAME, OLD_NAME):
        given = {"input_ids": tokens, "attention_mask": case.mask(3), name: copy.deepcopy(cache)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers.append(call(case, given))
        warned.append([str(each.message) for each in caught if each.category is FutureWarning])
    assert torch.equal(*answers)
    by_todays, by_old = warned
    assert not by_todays
    assert len(by_old) == (CACHE_NAME != OLD_NAME)
    assert all(f"`{OLD_NAME}` is deprecated" in message for message in by_old)


@pytest.mark.skipif(CACHE_NAME == OLD_NAME, reason="there is one name up to transformers 5.23")
def test_of_two_caches_the_one_by_todays_name_counts(case: Continued) -> None:
    cache, tokens = case.fill(), some_tokens(case.batch, 1)
    other = copy.deepcopy(cache)
    given = {"input_ids": tokens, "attention_mask": case.mask(1)}
    with pytest.warns(FutureWarning, match="Both .* are set"):
        generate(case, {**given, CACHE_NAME: cache, OLD_NAME: other})
    assert other.columns == case.batch.columns < cache.columns
