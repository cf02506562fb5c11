"""`output_attentions`: who sees whom, as the oracle's rows do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.policy import TokenClass
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget
from tests.models import tiny_llava
from tests.policies import Policy, pair, parallel, policy_of, skip
from tests.removals.removing import removal, removing

POLICIES: dict[str, Policy] = {
    "dense": policy_of(),
    "classes differ": policy_of(
        skip("1:3", ["image"], "block", kv="reuse"),
        skip([2], ["text"], "attention", kv="omit"),
        skip([0, 3], ["generated"], "ffn"),
    ),
    "omitted": policy_of(skip("1:", ["image"], "block", kv="omit")),
    "nobody attends": policy_of(skip([1], "all", "attention", kv="omit")),
    "last layer": policy_of(skip([3], ["image"], "attention", kv="project")),
    "parallel": policy_of(arrangements=(parallel([2]), parallel([3], "shared"))),
    "pair": policy_of(skip([0], ["image"], "block"), arrangements=(pair([[2, 3]]),)),
    "unimodal": policy_of() | {"masks": [{"layers": ":2", "kind": "unimodal"}]},
}


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(), impl="reference")


@pytest.fixture(scope="module", params=["left", "right"])
def batch(trio: Trio, request: pytest.FixtureRequest) -> Batch:
    return random_batch(trio.plain, seed=2, images=(1, 0, 2), padding=request.param)


def attending(model: Any, classes: Tensor, layer: int) -> Tensor:
    """`[B, T]`: rows whose class attends in a layer."""
    plan = fastskip.plan_of(model).layers[layer]
    who = torch.tensor([each in plan.attending for each in TokenClass])
    return who[classes]


def shown(oracle: MaskedOracle, **inputs: Any) -> list[Tensor]:
    with oracle, torch.no_grad():
        oracle.forward(**inputs)
        return [oracle.attentions[layer] for layer in range(4)]


@pytest.mark.parametrize("name", POLICIES)
def test_weights_are_the_oracles(trio: Trio, batch: Batch, name: str) -> None:
    policy, inputs = POLICIES[name], batch.inputs()
    eager, truth = (
        shown(MaskedOracle(each, policy), **inputs) for each in (trio.plain, trio.exact)
    )
    model = trio.under(policy)
    with torch.no_grad():
        plain = model(**inputs)
        found = model(**inputs, output_attentions=True)
    assert torch.equal(found.logits, plain.logits) and plain.attentions is None
    assert len(found.attentions) == 4
    for layer, weights in enumerate(found.attentions):
        rows = batch.real & attending(model, batch.token_classes, layer)
        assert not weights.transpose(1, 2)[~rows].any()
        if rows.any():
            by_row = (each.transpose(1, 2) for each in (weights, eager[layer], truth[layer]))
            assert_within_budget(f"layer {layer}", *by_row, rows=rows)


def test_weights_are_hugging_faces(trio: Trio) -> None:
    batch = random_batch(trio.plain, seed=2, images=(1, 0, 2), padding="left")
    stock = copy.deepcopy(trio.plain)
    stock.set_attn_implementation("eager")
    options = {"max_new_tokens": 3, "do_sample": False}
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    ours, theirs = (
        each.generate(**batch.inputs(), **options) for each in (trio.under(policy_of()), stock)
    )
    assert len(ours.attentions) == len(theirs.attentions) == 3
    for step, (own, expected) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        for weights, like in zip(own, expected, strict=True):
            rows = batch.real if step == 0 else slice(None)
            assert weights.shape == like.shape
            torch.testing.assert_close(weights.transpose(1, 2)[rows], like.transpose(1, 2)[rows])


@pytest.mark.parametrize("name", POLICIES)
def test_weights_of_a_step_are_those_of_the_whole(trio: Trio, batch: Batch, name: str) -> None:
    model, inputs = trio.under(POLICIES[name]), batch.inputs()
    options = {"output_attentions": True, "return_dict_in_generate": True, "do_sample": False}
    cached = model.generate(**inputs, max_new_tokens=3, **options)
    again = model.generate(**inputs, max_new_tokens=3, use_cache=False, **options)
    for stepped, whole in zip(cached.attentions, again.attentions, strict=True):
        for weights, like in zip(stepped, whole, strict=True):
            last = like[:, :, -weights.shape[2] :]
            torch.testing.assert_close(weights, last)


def test_rows_that_left_are_seen_no_more(trio: Trio, batch: Batch) -> None:
    model = trio.under(removing(removal(1, "spacing")))
    with torch.no_grad(), fastskip.record_routing(model) as record:
        found = model(**batch.inputs(), output_attentions=True).attentions
    (decisions,) = record.forwards
    assert decisions is not None
    for layer, weights in enumerate(found):
        sums = weights.sum(-1)[:, 0]
        seen = weights.sum((1, 2)) > 0
        assert torch.equal(seen, sums > 0)  # a row sees itself, if nobody else does
        stays = batch.real if layer < 2 else seen
        torch.testing.assert_close(sums, stays.float())
    assert int((found[1].sum((1, 2)) > 0).sum()) == int(batch.real.sum())
    assert int((found[2].sum((1, 2)) > 0).sum()) < int(batch.real.sum())


def test_weights_are_the_same_while_gradients_are_wanted(trio: Trio, batch: Batch) -> None:
    model = trio.under(POLICIES["classes differ"])
    with torch.no_grad():
        expected = model(**batch.inputs(), output_attentions=True).attentions
    found = model(**batch.inputs(), output_attentions=True)
    assert found.logits.requires_grad
    for weights, like in zip(found.attentions, expected, strict=True):
        assert not weights.requires_grad
        torch.testing.assert_close(weights, like)


def test_kernels_have_none_to_show(batch: Batch) -> None:
    model = fastskip.apply_(tiny_llava(), impl="torch")
    with torch.no_grad(), pytest.raises(ValueError, match="output_attentions.*impl='reference'"):
        model(**batch.inputs(), output_attentions=True)
