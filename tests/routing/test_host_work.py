"""What a call does between its graphs: as many operations whatever the depth, and few a step.

On a device each of them is a launch. Interpreted; what would be a graph is not counted.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastskip
from fastskip.decoder.fused.captured_forward import CapturedForwards
from fastskip.generation.guarding import Guarding
from fastskip.kernels import tuning
from tests.agreement import Trio
from tests.batches import random_batch
from tests.device.interpreted import STREAM
from tests.models import tiny_llava
from tests.policies import Policy, policy_of, skip
from tests.routing.routed import random, routed

NEW = 4
HOST = ("aten.zeros", "aten.slice")
"""What a layer may take for itself, before a prompt: a table without entries, on the host."""
POLICIES: dict[str, tuple[Policy, Guarding]] = {
    "dense": (policy_of(), Guarding.EARLY_EXIT),
    "rules": (policy_of(skip([1], ["image"], "block", kv="omit")), Guarding.EARLY_EXIT),
    "routers": (routed(random(":", "all", kv="omit")), Guarding.EARLY_EXIT),
    "routers, entries of all": (routed(random(":", "all", kv="project")), Guarding.EARLY_EXIT),
    "routers, in loops": (routed(random(":", "all", kv="omit")), Guarding.HOPS),
}


class Watching(TorchDispatchMode):
    """The operations before, between and behind graphs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: list[list[str]] = [[]]
        self.is_inside = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.is_inside:
            self.parts[-1].append(str(operation))
        return operation(*args, **(kwargs or {}))


@cache
def operations(depth: int, name: str) -> list[list[str]]:
    """Of a second call: of the first, whatever is to be captured is."""
    (policy, guarding), watching = POLICIES[name], Watching()

    def capture(
        work: Callable[[], None], device: torch.device, pool: Any = None
    ) -> Callable[[], None]:
        def replay() -> None:
            watching.parts.append([])
            watching.is_inside = True
            work()
            watching.is_inside = False

        return replay

    trio = Trio(
        tiny_llava(depth=depth, hidden=16, heads=2, kv_heads=1, head_dim=8, ffn=16), impl="triton"
    )
    batch = random_batch(trio.plain, 3, images=(1,), text=(3, 4))
    model: Any = fastskip.set_policy(trio.prepared, policy)
    model._fastskip.steps.guarding = guarding
    asked: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with tuning.table(STREAM), pytest.MonkeyPatch.context() as patched:
        for module in ("generation.device_step", "decoder.fused.captured_forward"):
            patched.setattr(f"fastskip.{module}.capture", capture)
        patched.setattr(CapturedForwards, "pays", lambda *_: True)
        model.generate(**batch.inputs(), **asked)
        watching.parts = [[]]
        with watching:
            model.generate(**batch.inputs(), **asked)
    return watching.parts


@pytest.mark.parametrize("name", POLICIES)
def test_depth_is_no_matter_between_graphs(name: str) -> None:
    few, many = (operations(depth, name) for depth in (3, 4))
    # Before the prompt's graph; between it and the first step; between steps; behind.
    assert len(few) == len(many) == 1 + 1 + (NEW - 1)
    before = [[each for each in own[0] if not each.startswith(HOST)] for own in (few, many)]
    assert before[0] == before[1]
    assert few[1:] == many[1:]
    # The first step finds another one launched behind it.
    between = many[3:-1]
    assert all(one == other for one, other in pairwise(between))
    assert 0 < len(between[0]) <= 8


def test_a_prompt_with_routers_takes_no_more_of_the_host() -> None:
    """What layers of dense rows have worked out, layers that go by flags alone do without."""
    dense, routers = (operations(3, name) for name in ("dense", "routers"))
    assert len(routers[0]) <= len(dense[0])
