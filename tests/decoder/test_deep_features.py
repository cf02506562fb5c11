"""Features that enter behind the first layers (Qwen3-VL's DeepStack), and what is left out there.

That forwards, beams and loading agree with Hugging Face is in `test_relatives.py`; the model here
has features behind its layers 0 and 1 of 4.
"""

import copy
from typing import Any

import pytest
import torch

import fastskip
from fastskip.decoder.fused.support import unsupported_plan
from fastskip.families import UnsupportedModelError, shape_of
from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy
from fastskip.verification.cells import IMAGE
from tests.agreement import Trio, expected, generate
from tests.batches import random_batch
from tests.models import Kind, tiny_llava
from tests.policies import Policy, pair, parallel, policy_of, skip
from tests.removals.removing import removal, removing
from tests.routing.routed import check_generate

KIND: Kind = "qwen3_vl"
POLICIES: dict[str, Policy] = {
    "dense": policy_of(),
    "image rows pass by": policy_of(skip(":2", ["image"], "block")),
    "image rows leave no entries": policy_of(skip(":", ["image"], "block", kv="omit")),
    "all rows pass by": policy_of(skip(":2", "all", "block", kv="omit")),
    "no attention": policy_of(skip([0], "all", "attention")),
    "no FFN": policy_of(skip([1], "all", "ffn")),
    "parallel": policy_of(arrangements=(parallel(":2"),)),
    "a pair": policy_of(arrangements=(pair([[0, 1]]),)),
    "a pair whose first layer has some": policy_of(arrangements=(pair([[1, 2]], "mean"),)),
}


@pytest.fixture(scope="module", params=["reference", "torch"])
def trio(request: pytest.FixtureRequest) -> Trio:
    return Trio(tiny_llava(KIND), request.param)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", POLICIES)
def test_policies(trio: Trio, name: str, padding: Any) -> None:
    batch = random_batch(trio.plain, 3, images=(2, 0, 1), padding=padding, extra_columns=2)
    trio.check_forward(POLICIES[name], batch)
    trio.check_greedy(POLICIES[name], batch)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_final_pair_whose_first_layer_has_some(impl: str) -> None:
    trio, policy = Trio(tiny_llava(KIND, depth=3), impl), policy_of(arrangements=(pair([[1, 2]]),))
    batch = random_batch(trio.plain, 3, images=(2, 0, 1), padding="left", extra_columns=2)
    trio.check_forward(policy, batch)
    trio.check_greedy(policy, batch)


def test_they_matter(trio: Trio) -> None:
    """Else what agrees with and without them would say nothing."""
    batch, bare = random_batch(trio.plain, 3, images=(2, 1)), copy.deepcopy(trio.plain)
    for merger in bare.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
        torch.nn.init.zeros_(merger.linear_fc2.bias)
    for name, policy in POLICIES.items():
        have, lack = (expected(model, policy, **batch.inputs()) for model in (trio.plain, bare))
        moved, is_image = (have - lack).abs().amax(-1), batch.token_classes == IMAGE
        assert moved[is_image].min() > 1e-2, name
        if name == "image rows leave no entries":  # nobody else sees them
            assert moved[batch.real & ~is_image].max() == 0


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("by", ["attention", "next_attention", "spacing"])
def test_rows_that_left_get_no_more(trio: Trio, by: str, after: int) -> None:
    batch = random_batch(trio.plain, 5, images=(2, 1))
    check_generate(trio, removing(removal(after, by)), batch, new=2)


@pytest.mark.parametrize("tokens", ["text", "image"])
def test_routers(trio: Trio, tokens: str) -> None:
    """A row's decision on a layer is on what enters it, features included; on a device it is taken
    before these come, and refused."""
    batch = random_batch(trio.plain, 6, images=(2, 1))
    on_device = trio.prepared._fastskip.decoder.ops.fused is not None
    for layers, looks in (([1, 2], True), ([3], False)):
        policy: Policy = {"schema_version": 1, "routers": [{
            "layers": layers, "tokens": [tokens], "skip": ["block"], "kv": "omit",
            "kind": "similarity", "threshold": 0.5,
        }]}  # fmt: skip
        if on_device and looks and tokens == "image":
            with pytest.raises(UnsupportedModelError, match="reference.*image rows in layer 1"):
                fastskip.set_policy(trio.prepared, policy)
            continue
        _, masks = check_generate(trio, policy, batch, new=2)
        assert any(mask.any() for mask in masks.values())


@torch.no_grad()
def test_hidden_states(trio: Trio) -> None:
    """Hugging Face shows what leaves a layer before features enter."""
    batch = random_batch(trio.plain, 7, images=(1, 1))
    found = [
        model(**batch.inputs(), output_hidden_states=True).hidden_states
        for model in (trio.plain, trio.under(policy_of()))
    ]
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs[batch.real], ours[batch.real])


def test_routers_that_come_before_or_do_not_look(trio: Trio) -> None:
    """What enters layer 0 has no features yet, and a draw looks at nothing."""
    batch = random_batch(trio.plain, 6, images=(2, 1))
    rule = {"tokens": ["image"], "skip": ["block"], "kv": "omit"}
    drawn = rule | {"layers": ":", "kind": "random", "rate": 0.5, "seed": 3}
    check_generate(trio, {"schema_version": 1, "routers": [drawn]}, batch, new=2)
    for layer, is_run in ((0, True), (1, False), (2, False), (3, True)):
        own = rule | {"layers": [layer], "kind": "linear", "weights": "w", "threshold": 0.0}
        plan = make_plan(
            SkipPolicy.coerce({"schema_version": 1, "routers": [own]}), shape_of(trio.plain.config)
        )
        assert (unsupported_plan(plan) is None) == is_run, layer


def test_more_layers_with_features_than_there_are() -> None:
    config = copy.deepcopy(tiny_llava(KIND).config)
    config.vision_config.deepstack_visual_indexes = [0, 1, 0, 1]
    with pytest.raises(UnsupportedModelError, match="deepstack_visual_indexes.*fewer than.*4"):
        fastskip.families.check_config(config)


def test_a_copy_and_no_cache(trio: Trio) -> None:
    batch = random_batch(trio.plain, 8, images=(1, 2))
    model = copy.deepcopy(trio.under(POLICIES["no FFN"]))
    assert torch.equal(generate(model, batch), generate(model, batch, use_cache=False))
