"""What is kept of a model's layers is kept only as long as nothing of them differs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastskip
from fastskip.decoder.module_state import ModuleState
from tests.agreement import Trio
from tests.batches import random_batch
from tests.models import tiny_llava
from tests.policies import policy_of, skip

Change = Callable[[Any], object]


def _replace_parameter(layer: Any) -> None:
    layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight.detach().clone())


def _swap_hook(layer: Any) -> None:
    """As many as before, another one."""
    hooks = layer.self_attn.o_proj._forward_hooks
    hooks[next(iter(hooks))] = lambda *_: None


CHANGES: dict[str, Change] = {
    "training": lambda layer: layer.train(),
    "a hook": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
    "a hook of gradients": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "another hook": _swap_hook,
    "a wrapped forward": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "another module": lambda layer: setattr(layer, "mlp", copy.deepcopy(layer.mlp)),
    "one module more": lambda layer: layer.add_module("extra", nn.Identity()),
    "another parameter": _replace_parameter,
    "other data": lambda layer: setattr(
        layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data.clone()
    ),
    "another dtype": lambda layer: layer.mlp.half(),
    "a bias": lambda layer: layer.mlp.up_proj.register_parameter(
        "bias", nn.Parameter(torch.zeros(48))
    ),
    "frozen": lambda layer: layer.mlp.requires_grad_(False),
    "a norm's number": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.1),
    "an attention's scale": lambda layer: setattr(layer.self_attn, "scaling", 0.1),
    "a sublayer's multiplier": lambda layer: setattr(layer, "residual_multiplier", 0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name: str) -> None:
    first, second = tiny_llava("llava_next_granite", depth=2).get_decoder().layers
    second.self_attn.o_proj.register_forward_hook(lambda *_: None)
    state = ModuleState(first, second)
    assert state.is_current() and state.is_current()
    CHANGES[name](second)
    assert not state.is_current()
    assert ModuleState(first, second).is_current()


def test_values_are_no_matter() -> None:
    """They are where they were, for whoever reads them there."""
    layer = tiny_llava(depth=1).get_decoder().layers[0]
    state = ModuleState(layer)
    with torch.no_grad():
        layer.mlp.up_proj.weight.add_(1.0)
    assert state.is_current()


@pytest.mark.parametrize("name", ["a norm's number", "an attention's scale"])
def test_a_settled_model_follows(name: str) -> None:
    plain = tiny_llava(depth=2)
    trio, batch = Trio(plain), random_batch(plain, 3, images=(1,))
    policy = policy_of(skip([0], ["image"], "ffn"))
    model = trio.under(policy)
    with torch.no_grad():
        before = [model(**batch.inputs()).logits for _ in range(2)]
        for each in (plain, model):
            CHANGES[name](each.get_decoder().layers[1])
        after = model(**batch.inputs()).logits
    assert torch.equal(*before)
    assert (after - before[0]).abs().max() > 1e-4
    trio.check_forward(policy, batch)


def test_a_settled_model_takes_another_policy() -> None:
    plain = tiny_llava(depth=2)
    trio, batch = Trio(plain), random_batch(plain, 3, images=(1,))
    for policy in (policy_of(), policy_of(skip([1], "all", "block")), policy_of()):
        trio.check_forward(policy, batch)
        trio.check_forward(policy, batch)
    assert fastskip.plan_of(trio.prepared).is_dense
