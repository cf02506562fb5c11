"""Routed runs against the masked dense computation with the decisions read back."""

from typing import Any

import pytest

from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.policies import KV, pair, parallel, skip
from tests.routing.routed import check_forward, check_generate, random, routed, similarity

GROUPS: dict[str, dict[str, Any]] = {
    "row": {},
    "sequence, mean": {"group": "sequence"},
    "sequence, any": {"group": "sequence", "agree": "any"},
    "batch, mean": {"group": "batch"},
    "batch, any": {"group": "batch", "agree": "any"},
}
MIXED = {
    "attention and FFN apart": routed(
        random([1, 2], "all", "attention", kv="omit", seed=1), random("1:4", ["text"], "ffn")
    ),
    "beside rules": routed(
        random([0, 2], ["image"], "ffn"),
        random([1, 3], ["text", "generated"], "block", kv="reuse"),
        rules=[skip([2], ["text"], "ffn"), skip([3], ["image"], "block", kv="reuse")],
    ),
    "parallel, own": routed(
        random([1, 2], "all", "ffn"),
        random([3], "all", "block", kv="omit"),
        arrangements=(parallel(":"),),
    ),
    "parallel, shared, apart": routed(
        random(":", "all", "ffn", seed=2),
        random("1:", ["text", "image"], "attention", kv="reuse", seed=3),
        arrangements=(parallel(":", "shared"),),
    ),
    "around a pair": routed(random([0, 3]), arrangements=(pair([[1, 2]]),)),
    "copies beside holes": routed(
        random([1], ["text"], "attention", kv="omit"),
        random([1, 3], ["image"], "attention", kv="reuse", seed=5),
        rules=[skip([1], ["generated"], "attention", kv="reuse")],
    ),
    "similarity": routed(similarity("1:4", "all", "block", threshold=0.9)),
    "change, FFN": routed(similarity("1:", "all", "ffn", threshold=0.8, measure="change")),
    "similarity over a static skip": routed(
        similarity([3], "all", "block", threshold=0.5), rules=[skip([2], ["text"], "block")]
    ),
}
HOLES = {
    "routers": routed(
        random([1], "all", "attention", kv="omit"),
        random([2, 3], "all", "attention", kv="reuse", seed=5),
    ),
    "a rule": routed(
        random([1], "all", "attention", kv="omit"),
        rules=[skip([2], ["image"], "block", kv="reuse")],
    ),
    "a layer with holes of another class": routed(
        random([1], ["text"], "attention", kv="omit"),
        random([1, 2], ["image"], "attention", kv="reuse", seed=5),
    ),
    "from the bottom": routed(random(":", "all", "block", kv="reuse", rate=0.6)),
}
"""Rows that copy an entry find none in the nearest layer below, and look further."""


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, images=(2, 0, 1), seed=3)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("sublayers", ("attention", "block"))
def test_random(trio: Trio, batch: Batch, sublayers: str, kv: str, group: str) -> None:
    # Layer 0 has nothing below it to copy from: see the cases with holes.
    layers = "1:4" if kv == "reuse" else "0:4"
    policy = routed(random(layers, "all", sublayers, kv=kv, **GROUPS[group]))
    masks = check_forward(trio, policy, batch)
    assert any(bool(mask[batch.real].any()) for mask in masks.values())
    assert not all(bool(mask[batch.real].all()) for mask in masks.values())
    check_generate(trio, policy, batch)


@pytest.mark.reference
@pytest.mark.parametrize("name", HOLES)
def test_copies_over_holes(trio: Trio, batch: Batch, name: str) -> None:
    check_forward(trio, HOLES[name], batch)
    check_generate(trio, HOLES[name], batch)


@pytest.mark.parametrize("name", MIXED)
def test_mixed(trio: Trio, batch: Batch, name: str) -> None:
    masks = check_forward(trio, MIXED[name], batch)
    assert any(bool(mask[batch.real].any()) for mask in masks.values())
    check_generate(trio, MIXED[name], batch)
