"""Skipped work is not computed: FLOPs that torch executes are the ones that the plan counts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastskip
from fastskip.plan import SkipPlan
from fastskip.plan.costs import Cost, decode_cost, prefill_cost
from fastskip.policy import TokenClass
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.policies import CELLS, MIXED, Policy, cell_policy, pair, policy_of

pytestmark = pytest.mark.reference  # counts torch's products, without rounded-up batches
NEW = 3
# What is not the decoder's, as it is called by the model and by Hugging Face's generate.
OUTSIDE = (".vision_tower", "CLIPVisionModel", ".multi_modal_projector", "MultiModalProjector")


@pytest.fixture(scope="module")
def trio() -> Trio:
    trio = Trio(tiny_llava(image_tokens=9))
    # Rotary tables are made on first use.
    trio.prepared.generate(torch.tensor([[1, 2]]), max_new_tokens=60)
    return trio


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    # Ragged, with pads that nobody should compute anything for.
    return random_batch(trio.plain, seed=1, images=(2, 0, 1), extra_columns=3)


def executed(run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs by kind: linears of the decoder and its head, and the batched products of attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()
    outside = [name for name in counts if name.endswith(OUTSIDE)]

    def of(*ops: Any) -> int:
        def total(name: str) -> int:
            return sum(int(counts[name].get(op, 0)) for op in ops)

        return total("Global") - sum(total(name) for name in outside)

    aten = torch.ops.aten
    return {"linear": of(aten.mm, aten.addmm), "attention": of(aten.bmm, aten.baddbmm)}


def prompts(batch: Batch) -> list[list[TokenClass]]:
    classes = list(TokenClass)
    return [
        [classes[code] for code in row[real].tolist()]
        for row, real in zip(batch.token_classes, batch.real, strict=True)
    ]


def linear_flops(costs: list[Cost]) -> int:
    return sum(cost.flops - cost.flops_by_kind["scores"] for cost in costs)


def prefill_costs(plan: SkipPlan, batch: Batch, wanted: int) -> list[Cost]:
    return [prefill_cost(plan, prompt, wanted=wanted) for prompt in prompts(batch)]


def decode_costs(plan: SkipPlan, batch: Batch, steps: int) -> list[Cost]:
    counts = [{c: prompt.count(c) for c in set(prompt)} for prompt in prompts(batch)]
    return [decode_cost(plan, count, steps=steps) for count in counts]


def check(trio: Trio, batch: Batch, policy: Policy) -> None:
    model = trio.under(policy)
    plan = fastskip.plan_of(model)
    prompt = linear_flops(prefill_costs(plan, batch, wanted=1))
    decode = decode_costs(plan, batch, NEW - 1)
    first = executed(lambda: model(**batch.inputs(), logits_to_keep=1))
    assert first["linear"] == prompt
    options = {"max_new_tokens": NEW, "do_sample": False}
    both = executed(lambda: model.generate(**batch.inputs(), **options))
    assert both["linear"] == prompt + linear_flops(decode)
    # One row attends to what its sequence holds: no pads, nothing that the policy left out.
    scores = sum(cost.flops_by_kind["scores"] for cost in decode)
    assert both["attention"] - first["attention"] == scores


@pytest.mark.parametrize("layers", ["middle", "last"])
@pytest.mark.parametrize("token_class", ["image", "text", "generated"])
@pytest.mark.parametrize("cell", CELLS)
def test_cell(trio: Trio, batch: Batch, cell: str, token_class: str, layers: str) -> None:
    check(trio, batch, cell_policy(cell, token_class, layers))


@pytest.mark.parametrize("name", ["dense", *MIXED])
def test_mixed_cells(trio: Trio, batch: Batch, name: str) -> None:
    check(trio, batch, MIXED.get(name, policy_of()))


@pytest.mark.parametrize("token_class", ["image", "text", "generated"])
def test_a_last_pair_for_some_classes(trio: Trio, batch: Batch, token_class: str) -> None:
    arranged = pair("2:4") | {"tokens": [token_class]}
    check(trio, batch, policy_of(arrangements=(arranged,)))


@pytest.mark.parametrize("name", ["dense", "each class its own rule", "pairs to the end"])
def test_a_forward_for_all_logits_runs_every_real_row(trio: Trio, batch: Batch, name: str) -> None:
    model = trio.under(MIXED.get(name, policy_of()))
    plan = fastskip.plan_of(model)
    found = executed(lambda: model(**batch.inputs()))
    columns = batch.size * batch.columns
    # The head is Hugging Face's and sees pads as well.
    head = 2 * plan.shape.hidden_size * plan.shape.vocab_size * (columns - int(batch.real.sum()))
    assert found["linear"] - head == linear_flops(prefill_costs(plan, batch, wanted=columns))


def test_the_count_can_tell(trio: Trio, batch: Batch) -> None:
    dense, policy = policy_of(), MIXED["each class its own rule"]
    counts = []
    for each in (dense, policy):
        model = trio.under(each)
        counts.append(executed(partial(model, **batch.inputs(), logits_to_keep=1))["linear"])
    assert counts[1] < 0.8 * counts[0]
    plain = executed(lambda: trio.plain(**batch.inputs(), logits_to_keep=1))["linear"]
    assert counts[0] < plain  # Hugging Face computes pads and every row of the last layer
