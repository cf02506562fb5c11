"""Gradients are those of autograd through the masked dense computation, in fp64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import PreTrainedModel

import fastskip
from fastskip.families import text_model_of
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.verification.cells import GENERATED
from fastskip.verification.exact import compute_in_double
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import answer_labels
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.policies import CELLS, MIXED, Policy, cell_policy, policy_of

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module", params=["llava", "llava_opt", "internvl_qwen3"])
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_llava(request.param, attention_bias=True, dtype=torch.float64)


@pytest.fixture(scope="module")
def prepared(plain: PreTrainedModel) -> Any:
    model = fastskip.apply_(copy.deepcopy(plain))
    # As for the oracle: Hugging Face's norms and rotary tables would round to fp32.
    compute_in_double(text_model_of(model), lambda handle: None)
    return model


@pytest.fixture(scope="module")
def batch(plain: PreTrainedModel) -> Batch:
    return random_batch(plain, seed=1, images=(2, 0, 1))


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.inputs().items()
    }


def gradients(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> Gradients:
    """Of the mean loss of the labelled rows, by parameter; where nothing flows, zeros."""
    model.zero_grad()
    # Not the model's own loss, which rounds to fp32.
    cross_entropy(logits[:, :-1].mT, labels[:, 1:]).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def oracle_gradients(plain: PreTrainedModel, policy: Policy, batch: Batch) -> Gradients:
    labels, classes = answer_labels(batch)
    with MaskedOracle(plain, policy) as oracle:
        return gradients(plain, oracle.forward(**inputs_of(batch), token_classes=classes), labels)


def check(prepared: Any, plain: PreTrainedModel, policy: Policy, batch: Batch) -> None:
    truth = oracle_gradients(plain, policy, batch)
    # Also without any attention: an image's last row predicts the token after it.
    assert truth["model.multi_modal_projector.linear_1.weight"].any()
    compare(prepared, policy, batch, truth)


def compare(prepared: Any, policy: Policy, batch: Batch, truth: Gradients) -> None:
    labels, _ = answer_labels(batch)
    model = fastskip.set_policy(prepared, policy)
    for use_cache in (False, True):
        logits = model(**inputs_of(batch), labels=labels, use_cache=use_cache).logits
        assert_close(gradients(model, logits, labels), truth)


@pytest.mark.parametrize("token_class", ["image", "text", "generated"])
@pytest.mark.parametrize("cell", CELLS)
def test_cell(
    prepared: Any, plain: PreTrainedModel, batch: Batch, cell: str, token_class: str
) -> None:
    check(prepared, plain, cell_policy(cell, token_class, "middle"), batch)


@pytest.mark.parametrize("name", ["dense", *MIXED])
def test_mixed_cells(prepared: Any, plain: PreTrainedModel, batch: Batch, name: str) -> None:
    check(prepared, plain, MIXED.get(name, policy_of()), batch)


@pytest.mark.parametrize("name", ["dense", *MIXED])
def test_through_a_past(prepared: Any, plain: PreTrainedModel, batch: Batch, name: str) -> None:
    """New rows after a cache: what flows into their embeddings. The cache itself is constant."""
    policy = MIXED.get(name, policy_of())
    tokens = torch.randint(1, 60, (batch.size, 4))
    mask = torch.cat([batch.attention_mask, torch.ones_like(tokens)], dim=1)
    classes = torch.tensor([[1, 2, 2, 2], [2, 1, 1, 2], [0, 2, 1, 1]])
    with MaskedOracle(plain, policy) as oracle:
        prompt = oracle.prompt(**batch.inputs() | inputs_of(batch))
        new = plain.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = oracle.forward(
            inputs_embeds=torch.cat([prompt.embeddings, new], dim=1),
            attention_mask=mask,
            token_classes=torch.cat([batch.token_classes, classes], dim=1),
        )[:, -4:]
        truth = torch.autograd.grad(cross_entropy(logits[:, :-1].mT, tokens[:, 1:]), new)

    model = fastskip.set_policy(prepared, policy)
    with torch.no_grad():
        cache = model(**inputs_of(batch), use_cache=True)[CACHE_NAME]
    new = new.detach().requires_grad_()
    logits = model(
        inputs_embeds=new, attention_mask=mask, token_classes=classes, **{CACHE_NAME: cache}
    ).logits
    actual = torch.autograd.grad(cross_entropy(logits[:, :-1].mT, tokens[:, 1:]), new)
    assert_close(actual, truth)
    # The new rows went into the cache as well, without history.
    assert cache.get_seq_length() == mask.shape[1]
    assert not any(
        keys.requires_grad for entries in cache.entries.values() for keys in entries.keys
    )


def test_a_cache_from_a_training_forward_goes_on(
    prepared: Any, plain: PreTrainedModel, batch: Batch
) -> None:
    policy = MIXED["each class its own rule"]
    model = fastskip.set_policy(prepared, policy)
    cache = model(**inputs_of(batch), use_cache=True)[CACHE_NAME]
    token = torch.randint(1, 60, (batch.size, 1))
    mask = torch.cat([batch.attention_mask, torch.ones_like(token)], dim=1)
    classes = torch.full_like(token, GENERATED)
    with torch.no_grad():
        logits = model(
            input_ids=token, attention_mask=mask, token_classes=classes, **{CACHE_NAME: cache}
        ).logits
        with MaskedOracle(plain, policy) as oracle:
            prompt = oracle.prompt(**batch.inputs() | inputs_of(batch))
            truth = oracle.continuation(prompt, token)[:, -1:]
    assert_close(logits, truth)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trained", ["layers.2.self_attn.k_proj", "projector", "norm", "lm_head"])
def test_frozen_parameters(
    prepared: Any, plain: PreTrainedModel, batch: Batch, trained: str, mode: str
) -> None:
    policy = MIXED["each class its own rule"]
    labels, _ = answer_labels(batch)
    truth = oracle_gradients(plain, policy, batch)
    model = fastskip.set_policy(copy.deepcopy(prepared), policy)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    getattr(model, mode)()
    logits = model(**inputs_of(batch), labels=labels).logits
    kept = {name: gradient for name, gradient in truth.items() if trained in name}
    assert kept and any(gradient.any() for gradient in kept.values())
    assert_close(gradients(model, logits, labels), kept)


def test_a_step_changes_what_is_computed() -> None:
    """Optimisers write into the parameters that the merged products read."""
    model = fastskip.apply_(tiny_llava(), MIXED["parallel, skipped branches"])
    batch = random_batch(model, seed=1, images=(2, 0, 1))
    labels, _ = answer_labels(batch)
    with torch.no_grad():
        before = model(**batch.inputs()).logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch.inputs(), labels=labels).loss.backward()
    optimizer.step()
    fresh = tiny_llava()
    fresh.load_state_dict(model.state_dict())
    fastskip.apply_(fresh, MIXED["parallel, skipped branches"])
    with torch.no_grad():
        after = model(**batch.inputs()).logits
        assert torch.equal(after, fresh(**batch.inputs()).logits)
    assert not torch.allclose(after, before)
