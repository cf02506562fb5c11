"""Removals over interpreted kernels (compiled on a GPU), and the launches that they leave."""

import pytest
import torch

import fastskip
from fastskip.kernels import tuning
from fastskip.launches import decode_launches, prefill_launches
from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy
from tests.agreement import Trio
from tests.batches import random_batch
from tests.device.interpreted import STREAM
from tests.models import tiny_llava
from tests.removals.removing import removal, removing
from tests.routing.routed import check_generate
from tests.test_plan import shape

TABLE = "nvidia-h200"


def test_steps_and_stages_run_on_kernels() -> None:
    trio = Trio(tiny_llava(hidden=48, ffn=72, heads=4, kv_heads=2, head_dim=16), impl="triton")
    batch = random_batch(trio.plain, 3, images=(1,))
    policy = removing(removal(0, "attention"), removal(2, "next_attention", 0.3))
    with tuning.table(STREAM):
        tokens, masks = check_generate(trio, policy, batch, 2)
    assert masks[3, "ffn"].sum() > masks[1, "ffn"].sum() > 0
    expected = fastskip.set_policy(fastskip.apply_(trio.plain, policy), policy)
    again = expected.generate(**batch.inputs(), max_new_tokens=2, do_sample=False)
    assert torch.equal(again[:, batch.columns :], tokens)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_removal_adds_no_launch(stages: int) -> None:
    rules = [removal(layer, "spacing", 0.25) for layer in range(stages)]
    dense, fewer = (make_plan(SkipPolicy.from_dict(removing(*own)), shape()) for own in ([], rules))
    before, after = (prefill_launches(plan, 576, 64, 1, TABLE) for plan in (dense, fewer))
    assert after.launches == before.launches
    assert after.programs < before.programs
    steps = [decode_launches(plan, 1, 640, TABLE) for plan in (dense, fewer)]
    assert steps[0].launches == steps[1].launches
