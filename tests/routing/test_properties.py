"""Any routers, groups and rules of K/V, on any batch: what ran is what was decided."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastskip
from tests.agreement import Trio, generate
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.policies import skip
from tests.routing.routed import check_forward, check_generate, random, routed, similarity

DEPTH = 4
GROUPING: dict[str, dict[str, Any]] = {
    "row": {},
    "sequence, mean": {"group": "sequence"},
    "sequence, any": {"group": "sequence", "agree": "any"},
    "batch, mean": {"group": "batch"},
    "batch, any": {"group": "batch", "agree": "any"},
}
CAUSAL = {
    "random": random(":", "all", "block", rate=0.4, kv="omit"),
    "random, FFN": random(":", "all", "ffn", rate=0.5),
    "cosine": similarity("1:", "all", "block", threshold=0.85),
    "change": similarity(":", ["text", "generated"], "attention", threshold=0.9, measure="change"),
}
"""Each row decides for itself, from what is before it."""


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batches(trio: Trio) -> list[Batch]:
    return [
        random_batch(trio.plain, images=images, seed=seed)
        for seed, images in enumerate([(1,), (0, 2), (2, 0, 1)])
    ]


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """Routers that share no cell, and a rule where there is room."""
    layers = draw(st.lists(st.sampled_from(range(DEPTH)), min_size=1, unique=True))
    routers = []
    sublayers = draw(st.sampled_from([["block"], ["attention"], ["ffn"], ["attention", "ffn"]]))
    for sublayer in sublayers:
        fields: dict[str, Any] = dict(draw(st.sampled_from(list(GROUPING.values()))))
        if sublayer != "ffn":
            fields["kv"] = draw(st.sampled_from(["project", "omit"]))
        tokens = draw(
            st.sampled_from(["all", ["image"], ["text", "generated"], ["image", "generated"]])
        )
        is_drawn: bool = draw(st.booleans())
        if is_drawn:
            rate, seed = draw(st.floats(0, 1)), draw(st.integers(0, 5))
            routers.append(random(layers, tokens, sublayer, rate=rate, seed=seed, **fields))
        else:
            threshold = draw(st.floats(0.2, 1))
            routers.append(similarity(layers, tokens, sublayer, threshold=threshold, **fields))
    free = [layer for layer in range(DEPTH) if layer not in layers]
    rules = []
    has_rule: bool = draw(st.booleans())
    if free and has_rule:
        kv = draw(st.sampled_from(["project", "omit"]))
        rules.append(skip(free[:1], draw(st.sampled_from([["image"], ["text"]])), "block", kv=kv))
    return routed(*routers, rules=rules)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(policy=policies(), number=st.integers(0, 2))
def test_result_is_the_masked_one(
    trio: Trio, batches: list[Batch], policy: dict[str, Any], number: int
) -> None:
    check_forward(trio, policy, batches[number])
    check_generate(trio, policy, batches[number], new=3)


@pytest.mark.parametrize("grouping", ["row", "sequence, mean", "sequence, any"])
@pytest.mark.parametrize("name", CAUSAL)
def test_sequences_do_not_influence_each_other(
    trio: Trio, batches: list[Batch], name: str, grouping: str
) -> None:
    policy, batch = routed(CAUSAL[name] | GROUPING[grouping]), batches[2]
    together, masks = check_generate(trio, policy, batch)
    for index in range(batch.size):
        alone, own = check_generate(trio, policy, batch.alone(index))
        assert torch.equal(alone[0], together[index])
        real = torch.cat((batch.real[index], torch.ones(alone.shape[1] - 1, dtype=torch.bool)))
        for key, mask in own.items():
            assert torch.equal(mask[0], masks[key][index, real]), key


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_is_recomputed(trio: Trio, batches: list[Batch], name: str) -> None:
    model = fastskip.set_policy(trio.prepared, routed(CAUSAL[name]))
    cached = generate(model, batches[2])
    assert torch.equal(generate(model, batches[2], use_cache=False), cached)


@pytest.mark.parametrize("kv", ("project", "reuse", "omit"))
@pytest.mark.parametrize("sublayers", ("attention", "block", "ffn"))
def test_rates_0_and_1_are_static(
    trio: Trio, batches: list[Batch], sublayers: str, kv: str
) -> None:
    left: dict[str, Any] = {} if sublayers == "ffn" else {"kv": kv}
    layers, tokens = [1, 3], ["text", "generated"]
    skipping = routed(rules=[skip(layers, tokens, sublayers, **left)])
    for rate, static in ((0.0, routed()), (1.0, skipping)):
        for batch in batches:
            expected = generate(trio.under(static), batch)
            policy = routed(random(layers, tokens, sublayers, rate=rate, **left))
            assert torch.equal(generate(trio.under(policy), batch), expected)


def test_a_group_decides_together(trio: Trio, batches: list[Batch]) -> None:
    batch = batches[2]
    for grouping, fields in GROUPING.items():
        router = similarity("1:", "all", "ffn", threshold=0.9, **fields)
        masks = check_forward(trio, routed(router), batch)
        for mask in masks.values():
            real = [mask[index, batch.real[index]] for index in range(batch.size)]
            rows = real if grouping.startswith("sequence") else [torch.cat(real)]
            if grouping != "row":
                assert all(each.all() or not each.any() for each in rows), grouping


def test_steps_without_routers_decide_nothing(trio: Trio, batches: list[Batch]) -> None:
    policy = routed(
        similarity("1:", ["image"], "block", threshold=0.8), random([0], ["text"], "ffn")
    )
    _, masks = check_generate(trio, policy, batches[2])
    assert not any(mask[:, batches[2].columns :].any() for mask in masks.values())
