"""WHILE nodes of real graphs: as many turns as there are, and steps of a model that hop."""

from typing import Any

import pytest
import torch

import fastskip
from fastskip.generation.guarding import Guarding
from fastskip.ops import bodies
from fastskip.ops.conditions import set_condition
from fastskip.ops.graphs import capture
from tests.models import tiny_llava
from tests.policies import Policy, policy_of
from tests.routing.routed import random, routed, similarity

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
OMIT: Any = {"kv": "omit"}
POLICIES: dict[str, Policy] = {
    **{f"rate {rate}": routed(random(":", "all", rate=rate, **OMIT)) for rate in (0, 0.5, 0.9, 1)},
    "what the layer before did": routed(similarity("1:", "all", threshold=0.6, **OMIT)),
    "by batch": routed(random(":", "all", group="batch", rate=0.6, **OMIT)),
}


def test_a_loop_takes_its_turns() -> None:
    left, taken = (torch.zeros(1, dtype=torch.int32, device=CUDA) for _ in range(2))
    start = torch.zeros_like(left)
    nodes = bodies.bodies_on(CUDA)

    def begin(condition: int) -> None:
        left.copy_(start)
        taken.zero_()
        set_condition(left, condition)

    def take_turn(condition: int) -> None:
        taken.add_(left.clamp(max=1))
        left.sub_(1).clamp_(min=0)
        set_condition(left, condition)

    replay = capture(lambda: nodes.run_while(left, begin, take_turn, 7), CUDA)
    for count in (0, 1, 7, 2, 0, 5):
        start.fill_(count)
        replay()
        assert taken.item() == count and left.item() == 0


@pytest.mark.parametrize("name", POLICIES)
def test_steps_that_hop_and_steps_that_leave(name: str) -> None:
    """The same tokens and decisions by a loop and by early exits, in fp32."""
    plain = tiny_llava(depth=6, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32).to(CUDA)
    model = fastskip.apply_(plain, policy_of(), impl="triton")
    fastskip.set_policy(model, POLICIES[name])
    ids = torch.randint(3, 50, (3, 20), device=CUDA)
    steps: Any = model._fastskip.steps
    found = {}
    for guarding in (Guarding.EARLY_EXIT, Guarding.HOPS):
        steps.guarding = guarding
        with fastskip.record_routing(model) as record:
            tokens = model.generate(input_ids=ids, max_new_tokens=12, eos_token_id=None)
        found[guarding] = tokens, [each.skipped for each in record.forwards]
        hops = [step._hopping is not None for step in steps._steps.values()]
        assert hops[-1] is (guarding is Guarding.HOPS)
    (early, exits), (tokens, decisions) = found.values()
    assert torch.equal(early, tokens)
    for one, other in zip(exits, decisions, strict=True):
        assert all(torch.equal(mask, other[key]) for key, mask in one.items())
