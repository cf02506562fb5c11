"""peft's LoRA on a prepared model, against the same adapters on the untouched one."""

import copy
from typing import Any

import pytest
import torch

import fastskip
from tests.merging import assert_same_logits, ids, is_merged, logits
from tests.models import tiny_llama

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted() -> tuple[Any, Any]:
    stock: Any = tiny_llama(attention_bias=True, mlp_bias=True)
    model = fastskip.apply_(copy.deepcopy(stock))
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    pair = []
    for base in (model, stock):
        config = peft.LoraConfig(r=2, target_modules=targets, layers_to_transform=[1, 2])
        wrapped = peft.get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2, generator=generator)
        pair.append(wrapped)
    return pair[0], pair[1]


def test_adapters_are_used(adapted: tuple[Any, Any]) -> None:
    ours, theirs = adapted
    assert_same_logits(ours, theirs)
    with ours.disable_adapter():
        plain = logits(ours)
    assert (plain - logits(ours)).abs().max() > 1e-2
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = theirs.generate(input_ids=ids(), **options)
    assert torch.equal(ours.generate(input_ids=ids(), **options), expected)


def test_merging_them_in(adapted: tuple[Any, Any]) -> None:
    ours, theirs = (wrapped.merge_and_unload() for wrapped in adapted)
    assert_same_logits(ours, theirs)
    assert is_merged(ours)


def test_they_are_trained(adapted: tuple[Any, Any]) -> None:
    gradients = []
    for wrapped in adapted:
        wrapped(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 5 * 2
    for name, gradient in ours.items():
        allowed = 512 * torch.finfo(torch.float32).eps * float(theirs[name].abs().max())
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=allowed)
