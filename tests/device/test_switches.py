"""SWITCH nodes of real graphs: the right body runs, and prompts of a model go by them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.decoder.fused.counted_layer import SwitchBlock
from fastskip.ops import bodies, compiled
from fastskip.ops.graphs import capture
from fastskip.ops.routes import Chosen
from tests.models import tiny_llava
from tests.policies import Policy, parallel, policy_of
from tests.routing.routed import random, routed

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
POLICIES: dict[str, Policy] = {
    "block, omit": routed(random(":", "all", "block", kv="omit")),
    "block, project": routed(random(":", "all", "block", kv="project")),
    "attention": routed(random(":", "all", "attention", kv="omit")),
    "ffn": routed(random(":", "all", "ffn")),
    "parallel": routed(random(":", "all", "block", kv="omit"), arrangements=(parallel(":"),)),
}


def test_the_body_for_the_number_of_rows_runs() -> None:
    rows = 200
    x, weight = (torch.randn(*shape, device=CUDA) for shape in ((rows, 64), (32, 64)))
    runs = torch.zeros(rows, dtype=torch.int32, device=CUDA)
    out, seen = torch.zeros(rows, 32, device=CUDA), torch.zeros(1, device=CUDA)
    nodes = bodies.bodies_on(CUDA)

    def body(chosen: Chosen) -> None:
        assert chosen.index is not None and chosen.bound is not None
        seen.fill_(chosen.bound)
        out[chosen.index.long()] = x.index_select(0, chosen.index) @ weight.T

    def work() -> None:
        seen.zero_()
        out.zero_()
        nodes.run_counted(runs, compiled.choose_rows, body)

    replay = capture(work, CUDA)
    for count in (0, 1, 64, 65, 128, 129, 192, 193, 200, 0, 70):
        chosen = torch.randperm(rows, device=CUDA)[:count]
        runs.zero_()
        runs[chosen] = 1
        replay()
        bound = min(rows, -(-count // 64) * 64)
        assert seen.item() == bound
        assert out.any(dim=1).sum() == bound
        torch.testing.assert_close(out[chosen], x[chosen] @ weight.T)


@pytest.mark.parametrize("name", POLICIES)
def test_prompts_by_switches_and_by_counts(name: str) -> None:
    """The same prompt launch by launch, by kernels that count, and by bodies, in fp32."""
    plain = tiny_llava(heads=2, kv_heads=1, head_dim=16, dtype=torch.float32).to(CUDA)
    model = fastskip.apply_(plain, policy_of(), impl="triton")
    ids = torch.randint(3, 50, (2, 150), device=CUDA)
    found: dict[bool, list[Tensor]] = {}
    for switches in (False, True):
        fastskip.set_policy(model, POLICIES[name])
        captured: Any = model._fastskip.fused_decoder.captured
        captured.switches = switches
        with torch.no_grad():
            found[switches] = [model(input_ids=ids).logits for _ in range(4)]
        (forward,) = captured.values()
        assert isinstance(forward._layers.blocks[0], SwitchBlock) is switches
    eager, *counted = found[False]
    for logits in (*counted, *found[True]):
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits, eager, atol=1e-4, rtol=1e-4)
