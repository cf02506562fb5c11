"""Removals over interpreted kernels (compiled on a GPU), and the launches that they leave."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.decoder.fused.captured_forward import CapturedForward
from fastskip.kernels import tuning
from fastskip.launches import decode_launches, prefill_launches
from fastskip.ops.allocate import poisoned
from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.device.interpreted import STREAM
from tests.models import tiny_llava
from tests.plan.test_plan import shape
from tests.removals.removing import removal, removing

TABLE = "nvidia-h200"


def test_stages_one_by_one_captured_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt is launched, the second captured, the third served by the same graphs: three
    stages each, on poisoned memory."""
    plain = tiny_llava(hidden=48, ffn=72, heads=4, kv_heads=2, head_dim=16)
    trio = Trio(plain, impl="triton")
    policy = removing(removal(0, "attention"), removal(2, "next_attention", 0.3))
    runs: list[object] = []
    run = CapturedForward.run

    def counted(self: CapturedForward, *given: Any) -> Tensor:
        runs.append(self)
        return run(self, *given)

    monkeypatch.setattr(CapturedForward, "run", counted)
    for number, (seed, new) in enumerate(((3, 1), (4, 1), (13, 2))):
        batch = random_batch(trio.plain, seed, images=(1, 1), text=(5, 7))
        with tuning.table(STREAM), poisoned():
            model = trio.prepared if number else trio.under(policy)
            with fastskip.record_routing(model) as record:
                scores = scores_of(model, batch, new)
        reference = fastskip.apply_(copy.deepcopy(plain), policy, impl="reference")
        with fastskip.record_routing(reference) as expected:
            torch.testing.assert_close(scores, scores_of(reference, batch, new))
        masks = record.all_skipped()
        assert masks.keys() == expected.all_skipped().keys()
        assert all(torch.equal(mask, expected.all_skipped()[key]) for key, mask in masks.items())
        assert masks[3, "ffn"].sum() > masks[1, "ffn"].sum() > 0
        assert len(runs) == 3 * number and len(set(runs)) == min(3, 3 * number)


def scores_of(model: Any, batch: Batch, new: int) -> Tensor:
    out = model.generate(
        **batch.inputs(),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
    )
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_removal_adds_no_launch(stages: int) -> None:
    rules = [removal(layer, "spacing", 0.25) for layer in range(stages)]
    dense, fewer = (make_plan(SkipPolicy.from_dict(removing(*own)), shape()) for own in ([], rules))
    before, after = (prefill_launches(plan, 576, 64, 1, TABLE) for plan in (dense, fewer))
    assert after.launches == before.launches
    assert after.programs < before.programs
    steps = [decode_launches(plan, 1, 640, TABLE) for plan in (dense, fewer)]
    assert steps[0].launches == steps[1].launches
