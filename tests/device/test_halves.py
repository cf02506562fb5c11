"""Steps whose updates leave half of the norm that is next, on the torch form of the operations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastskip.generation.device_step import DeviceSteps
from fastskip.ops import fused
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.device.conftest import IMPL
from tests.generation.test_properties import Case, cases
from tests.models import tiny_llava
from tests.policies import MIXED, Policy, parallel, policy_of, skip
from tests.routing.routed import check_generate, random, routed, similarity

DEPTH, NEW = 4, 4
# What a step of each leaves: two a layer, but for what does nothing, and for parallel layers and
# pairs, which read their norms whole, as those do that rows may skip.
LEFT: dict[str, tuple[Policy, int]] = {
    "dense": (policy_of(), 2 * DEPTH),
    "image rows alone": (policy_of(skip(":", ["image"], "block")), 2 * DEPTH),
    "every second block": (policy_of(skip([0, 2], "all", "block", kv="omit")), 4),
    "entries of a block that is skipped": (policy_of(skip([1], "all", "block")), 2 * 3),
    "the last block": (policy_of(skip([3], "all", "block", kv="omit")), 2 * 3),
    "no FFN": (policy_of(skip(":", "all", "ffn")), DEPTH),
    "no attention": (policy_of(skip(":", "all", "attention", kv="omit")), DEPTH),
    # The update before reads by the norm of the entries, and nothing is left for the FFN.
    "no attention, entries": (policy_of(skip(":", "all", "attention")), DEPTH),
    "nothing": (policy_of(skip(":", "all", "block", kv="omit")), 0),
    "parallel in the middle": (policy_of(arrangements=(parallel([1]),)), 2 * 3 - 1),
    "pairs": (MIXED["pairs to the end"], 0),
    "a pair in the middle": (MIXED["pair, sum"], 1 + 2),
    "a router in the middle": (routed(random([1], "all", kv="omit")), 2 * 3 - 1),
    "an FFN's router": (routed(random([1], "all", "ffn")), 2 * 3 - 1),
    # Decisions ride in the update before, and so does a note of what it did.
    "a router that looks back": (
        routed(similarity([2], "all", threshold=0.5, kv="omit")),
        2 * 3 - 2,
    ),
}


class Halves:
    """How many were left, and how many were read, since this was made."""

    def __init__(self) -> None:
        self.left = self.read = 0


@contextmanager
def counted() -> Iterator[Halves]:
    found = Halves()
    halve, finish = fused.halve, fused.finish

    def left(*arguments: Any) -> Any:
        found.left += 1
        return halve(*arguments)

    def read(*arguments: Any) -> Any:
        found.read += 1
        return finish(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "halve", left)
        patch.setattr(fused, "finish", read)
        yield found


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(depth=DEPTH, attention_bias=True, mlp_bias=True), impl=IMPL)


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, 3, images=(1, 0))


@pytest.fixture
def steps(trio: Trio) -> Iterator[DeviceSteps]:
    own: DeviceSteps = trio.prepared._fastskip.steps
    own.halves = True
    yield own
    own.halves = False


@pytest.mark.parametrize("name", LEFT)
def test_all_that_is_left_is_read(trio: Trio, batch: Batch, steps: DeviceSteps, name: str) -> None:
    policy, count = LEFT[name]
    model = trio.under(policy)
    generate(model, batch, NEW)
    with counted() as halves:
        generate(model, batch, NEW)
    assert halves.left == halves.read == (NEW - 1) * count


@pytest.mark.parametrize("name", MIXED)
def test_the_same_tokens(trio: Trio, batch: Batch, steps: DeviceSteps, name: str) -> None:
    model = trio.under(MIXED[name])
    assert torch.equal(generate(model, batch, NEW), greedy(trio.plain, MIXED[name], batch, NEW))


@pytest.mark.parametrize("sublayer", ("block", "ffn", "attention"))
@pytest.mark.parametrize("layers", ([0], [1, 2], [3]), ids=str)
def test_beside_routers(
    trio: Trio, batch: Batch, steps: DeviceSteps, sublayer: str, layers: list[int]
) -> None:
    kv: dict[str, Any] = {} if sublayer == "ffn" else {"kv": "omit"}
    check_generate(trio, routed(random(layers, "all", sublayer, **kv)), batch, NEW)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=25,
)
@given(case=cases())
def test_any_policy_of_any_model(case: Case) -> None:
    trio = Trio(case.trio().plain, impl=IMPL)
    batch = case.batch(trio.plain)
    trio.prepared._fastskip.steps.halves = True
    with counted() as halves:
        tokens = generate(trio.under(case.policy), batch, NEW)
    assert torch.equal(tokens, greedy(trio.plain, case.policy, batch, NEW))
    assert halves.left == halves.read
    assert not (case.is_opt and halves.left)  # LayerNorms have none


def test_logits_that_the_host_reads(trio: Trio, batch: Batch, steps: DeviceSteps) -> None:
    model = trio.under(policy_of())
    tokens = generate(model, batch, NEW)
    with counted() as halves:
        assert torch.equal(generate(model, batch, NEW, renormalize_logits=True), tokens)
    assert halves.read > (NEW - 1) * 2 * DEPTH  # of a capture, too


def test_a_head_that_is_not_plain_takes_its_norm_whole(batch: Batch) -> None:
    model = Trio(tiny_llava(depth=DEPTH), impl=IMPL)
    expected = generate(model.prepared, batch, NEW)
    own = model.prepared
    own._fastskip.steps.halves = True
    hook = own.get_output_embeddings().register_forward_hook(lambda *_: None)
    with counted() as halves:
        assert torch.equal(generate(own, batch, NEW), expected)
    hook.remove()
    assert halves.left == halves.read == 0


def test_steps_of_either_kind_are_kept(trio: Trio, batch: Batch, steps: DeviceSteps) -> None:
    """A switch does not undo what was captured, and goes with a copy."""
    model = trio.under(policy_of())
    tokens = generate(model, batch, NEW)
    steps.halves = False
    assert torch.equal(generate(model, batch, NEW), tokens)
    assert len(steps._steps) == 2
    steps.halves = True
    generate(model, batch, NEW)
    assert len(steps._steps) == 2 and copy.deepcopy(steps).halves
