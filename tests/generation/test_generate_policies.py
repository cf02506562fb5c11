"""Beams, sampling and assistants under policies that treat every class differently.

Without a cache every step computes all rows anew, so what a cache keeps, reorders and crops has
nowhere to hide: both ways must say the same.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.policies import MIXED, Policy, pair, parallel, policy_of, skip

POLICIES: dict[str, Policy] = {
    "classes": MIXED["each class its own rule"],
    "layer 0 empty": policy_of(skip([0], "all", "attention"), skip([2], ["generated"], "block")),
    "wiring": policy_of(
        skip([0], ["generated"], "attention", kv="omit"),
        skip([0], ["image"], "ffn"),
        arrangements=(pair([[1, 2]]), parallel([3])),
    ),
}
NEW = 8


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    # At most one image each: with several, transformers 5.17 gives beams the wrong ones.
    return random_batch(trio.plain, 4, images=(1, 0, 1))


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


# The untouched loop takes a generated placeholder for an image when it has no cache.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that end": {"num_beams": 3, "eos_token_id": list(range(20, 40)), "length_penalty": 0.3},
    "sampling": {"do_sample": True, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_with_and_without_cache(
    trio: Trio, batch: Batch, policy: Policy, way: dict[str, Any]
) -> None:
    model = trio.under(policy)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"suppress_tokens": [62, 63], **way, "use_cache": use_cache}
        results.append(model.generate(**batch.inputs(), max_new_tokens=NEW, **options))
    assert torch.equal(*results)


def test_guidance_needs_a_cache(trio: Trio, batch: Batch) -> None:
    """Its processor runs forwards of its own, whose prompt only their cache remembers."""
    options = {**batch.inputs(), "max_new_tokens": NEW, "guidance_scale": 1.5}
    model = trio.under(POLICIES["classes"])
    with pytest.raises(ValueError, match="use_cache: False with guidance_scale"):
        model.generate(**options, use_cache=False)
    assert model.generate(**options).shape == (3, batch.columns + NEW)
    model = trio.under(
        policy_of(skip([1], ["image"], "ffn"), skip([2], ["text", "generated"], "ffn"))
    )
    options["suppress_tokens"] = [62, 63]
    without = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), without)


def test_one_beam_of_the_oracle(trio: Trio, batch: Batch, policy: Policy) -> None:
    expected = greedy(trio.plain, policy, batch, NEW)
    model = trio.under(policy)
    assert torch.equal(generate(model, batch, NEW), expected)
    assert torch.equal(generate(model, batch, NEW, use_cache=False), expected)


@pytest.mark.parametrize("assistant", ["prompt lookup", "dense", "itself", "another policy"])
def test_assisted_decoding_says_what_greedy_says(
    trio: Trio, batch: Batch, policy: Policy, assistant: str
) -> None:
    one = batch.alone(2)
    model = trio.under(policy)
    helper: Any = copy.deepcopy(trio.prepared)
    options: dict[str, Any] = {"assistant_model": helper}
    if assistant == "itself":
        options = {"assistant_model": model}
    elif assistant == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    elif assistant == "dense":
        fastskip.set_policy(helper, "dense")
    elif assistant == "another policy":
        fastskip.set_policy(helper, POLICIES["layer 0 empty"])
    expected = generate(model, one, 2 * NEW)
    assert torch.equal(generate(model, one, 2 * NEW, **options), expected)


def test_a_batch_says_what_its_prompts_say_alone(trio: Trio, batch: Batch, policy: Policy) -> None:
    model = trio.under(policy)
    together = generate(model, batch, NEW)
    for index in range(batch.size):
        assert torch.equal(generate(model, batch.alone(index), NEW), together[index : index + 1])


def test_right_padding_says_what_prompts_say_alone(trio: Trio, policy: Policy) -> None:
    batch = random_batch(trio.plain, 4, images=(2, 0, 1), padding="right", extra_columns=2)
    model = trio.under(policy)
    together = generate(model, batch, NEW)
    beams = generate(model, batch, NEW, num_beams=2)
    for index in range(batch.size):
        one = batch.alone(index)
        assert torch.equal(generate(model, one, NEW), together[index : index + 1])
        assert torch.equal(generate(model, one, NEW, num_beams=2), beams[index : index + 1])


def test_a_sequence_that_has_ended_disturbs_no_other(
    trio: Trio, batch: Batch, policy: Policy
) -> None:
    model = trio.under(policy)
    free = generate(model, batch, NEW)
    eos = int(free[0, 2])
    ended = generate(model, batch, NEW, eos_token_id=eos)
    for row in range(batch.size):
        length = _length(free[row], eos)
        assert torch.equal(ended[row, :length], free[row, :length])
        assert not ended[row, length:].any()  # pads


def _length(tokens: Tensor, eos: int) -> int:
    """Tokens up to the first end, itself included."""
    ends = (tokens == eos).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(tokens)
