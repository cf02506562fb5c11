"""Training under routers: the gradient is that of the masked dense computation, in fp64."""

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

import fastskip
from fastskip.families import text_model_of
from fastskip.verification.exact import compute_in_double
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import answer_labels
from tests.batches import random_batch
from tests.decoder.test_gradients import gradients, inputs_of
from tests.models import tiny_llava
from tests.policies import parallel
from tests.routing.routed import random, routed, similarity

POLICIES = {
    "block, omit": routed(random([1, 2], "all", "block", kv="omit")),
    "reuse": routed(random("1:", ["image", "generated"], "attention", kv="reuse")),
    "FFN": routed(similarity("1:", "all", "ffn", threshold=0.9)),
    "parallel": routed(random(":", "all", "ffn"), arrangements=(parallel(":"),)),
}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_llava(attention_bias=True, dtype=torch.float64)


@pytest.mark.parametrize("keeps_cache", (False, True))
@pytest.mark.parametrize("name", POLICIES)
def test_gradient_is_the_masked_one(plain: PreTrainedModel, name: str, keeps_cache: bool) -> None:
    batch = random_batch(plain, seed=1, images=(2, 0, 1))
    labels, classes = answer_labels(batch)
    model: Any = fastskip.apply_(copy.deepcopy(plain), POLICIES[name])
    compute_in_double(text_model_of(model), lambda handle: None)
    with fastskip.record_routing(model) as record:
        logits = model(**inputs_of(batch), labels=labels, use_cache=keeps_cache).logits
    masks = record.all_skipped()
    assert any(mask.any() for mask in masks.values())
    with MaskedOracle(plain, POLICIES[name], masks) as oracle:
        expected = oracle.forward(**inputs_of(batch), token_classes=classes)
        truth = gradients(plain, expected, labels)
    assert truth["model.multi_modal_projector.linear_1.weight"].any()
    assert_close(gradients(model, logits, labels), truth)
