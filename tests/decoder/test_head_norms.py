"""Models whose query and key heads have norms of their own, as Qwen3's do."""

import copy
from typing import Any

import pytest
import torch

import fastskip
from fastskip.families import shape_of
from fastskip.kernels import tuning
from fastskip.launches import decode_launches
from fastskip.ops.account import counted
from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.device.interpreted import STREAM
from tests.generation.test_drop_in import Edit, check_followed, told
from tests.models import tiny_llava, tiny_text_only
from tests.policies import MIXED, Policy
from tests.routing.routed import check_forward, check_generate, random, routed

IMPLS = ["reference", "torch"]
NEW = 3


@pytest.fixture(scope="module")
def plain() -> Any:
    """Sizes that are no multiples of a block."""
    return tiny_llava("internvl_qwen3", hidden=48, ffn=72, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture(scope="module", params=IMPLS)
def trio(request: pytest.FixtureRequest, plain: Any) -> Trio:
    return Trio(copy.deepcopy(plain), request.param)


@pytest.fixture(scope="module")
def batch(plain: Any) -> Batch:
    return random_batch(plain, 3, images=(1, 0))


@pytest.mark.parametrize("name", MIXED)
def test_mixed_cells(trio: Trio, batch: Batch, name: str) -> None:
    trio.check_forward(MIXED[name], batch)
    trio.check_greedy(MIXED[name], batch)


ROUTED: dict[str, Policy] = {
    "blocks": routed(random("1:3", "all", kv="project")),
    "attention": routed(random([1, 2], "all", "attention", kv="omit")),
    "parallel": routed(random([1], "all"), arrangements=[{"layers": [1], "kind": "parallel"}]),
}


@pytest.mark.parametrize("name", ROUTED)
def test_routers(trio: Trio, batch: Batch, name: str) -> None:
    for masks in (
        check_forward(trio, ROUTED[name], batch),
        check_generate(trio, ROUTED[name], batch)[1],
    ):
        assert any(mask.any() for mask in masks.values())


KERNELS: dict[str, Policy] = {n: MIXED[n] for n in ("each class its own rule", "parallel, shared")}


@pytest.mark.parametrize("name", KERNELS)
def test_token_for_token_on_kernels(plain: Any, batch: Batch, name: str) -> None:
    trio = Trio(copy.deepcopy(plain), impl="triton")
    tokens = greedy(trio.plain, KERNELS[name], batch, NEW)
    with tuning.table(STREAM), counted() as account:
        assert torch.equal(generate(trio.under(KERNELS[name]), batch, NEW), tokens)
    assert account.by_kernel["head"][0] == NEW - 1  # every step ran on kernels
    assert account.by_kernel["rotate_append"][0] >= 4 * NEW


def test_decisions_on_kernels(plain: Any, batch: Batch) -> None:
    trio = Trio(copy.deepcopy(plain), impl="triton")
    with tuning.table(STREAM):
        check_generate(trio, ROUTED["blocks"], batch, 2)


def test_a_step_takes_one_more_launch_a_layer() -> None:
    """Kernels of few rows share a head among programs, so heads turn in a launch of their own."""
    plans = [
        make_plan(SkipPolicy(), shape_of(tiny_text_only(family).config, torch.bfloat16))
        for family in ("qwen3", "qwen2")
    ]
    normed, other = (decode_launches(plan, 1, 64).by_kernel for plan in plans)
    assert normed["project_append"][0] == normed["rotate_append"][0] == plans[0].shape.depth
    assert "rotate_append" not in other


def replace_norm(model: Any) -> None:
    other = copy.deepcopy(model.model.layers[1].self_attn.k_norm)
    other.weight.data.mul_(-2.0)
    model.model.layers[1].self_attn.k_norm = other


def change_weights(model: Any) -> None:
    model.model.layers[1].self_attn.q_norm.weight.data.mul_(-3.0)


def change_epsilon(model: Any) -> None:
    model.model.layers[1].self_attn.q_norm.variance_epsilon = 2.0


def hook_norm(model: Any) -> None:
    norm = model.model.layers[1].self_attn.k_norm
    norm.register_forward_hook(lambda module, given, out: 0.5 * out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("edit", [replace_norm, change_weights, change_epsilon, hook_norm])
def test_changes_to_norms_of_heads_are_followed(edit: Edit, impl: str) -> None:
    stock = tiny_text_only("qwen3")
    check_followed((stock, fastskip.apply_(copy.deepcopy(stock), impl=impl)), edit)


def test_layer_norms_of_heads_are_no_business_of_kernels() -> None:
    model = tiny_text_only("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm = torch.nn.LayerNorm(8)
    stock = copy.deepcopy(model)
    assert told(fastskip.apply_(copy.deepcopy(model))) == told(stock)
    with pytest.raises(ValueError, match="norm of heads; supported: .*RMS norms of heads"):
        fastskip.apply_(model, impl="torch")
