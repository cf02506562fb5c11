"""Merged projections: one storage, the checkpoint's parameters as views of it, never stale ones."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastskip
from fastskip.ops.allocate import empty
from tests.batches import random_batch
from tests.merging import (
    MOVES,
    assert_equal_parameters,
    assert_same_logits,
    groups,
    ids,
    is_merged,
    logits,
)
from tests.models import tiny_llama, tiny_llava


@pytest.fixture
def stock() -> Any:
    return tiny_llama(attention_bias=True, mlp_bias=True)


@pytest.fixture
def model(stock: Any) -> Any:
    return fastskip.apply_(copy.deepcopy(stock))


def test_parameters_are_views_of_one_storage(stock: Any, model: Any) -> None:
    assert is_merged(model) and not is_merged(stock)
    assert_equal_parameters(model, stock)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert_same_logits(model, stock)


def test_weights_are_held_once(stock: Any, model: Any) -> None:
    def held(model: Any) -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        return sum(storage.nbytes() for storage in storages.values())

    assert held(model) == held(stock) == sum(p.nbytes for p in model.parameters())


def test_no_more_than_one_layer_is_held_twice(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's storage is made, the layers before it have let go of what they had."""
    parameters = [p for modules in groups(stock) for m in modules for p in m.parameters()]
    total = sum(p.nbytes for p in parameters)
    layers = len(stock.model.layers)
    held: list[int] = []

    def watched(*arguments: Any) -> Tensor:
        made: Tensor = empty(*arguments)
        live = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        held.append(sum(live.values()) + made.nbytes)
        return made

    monkeypatch.setattr("fastskip.decoder.merging.empty", watched)
    fastskip.apply_(stock)
    assert len(held) == layers * 4
    assert max(held) <= total + total / layers


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_moved_models_are_right_and_merge_again(
    stock: Any, model: Any, move: Callable[[Any], Any]
) -> None:
    moved = move(model)
    assert type(moved) is type(model)
    assert_same_logits(moved, stock)
    assert is_merged(moved)
    assert_equal_parameters(moved, stock)


def test_another_dtype(stock: Any, model: Any) -> None:
    model.to(torch.float64)
    stock.to(torch.float64)
    assert logits(model).dtype == torch.float64
    assert_same_logits(model, stock)
    assert is_merged(model)


@pytest.mark.parametrize("move", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(stock: Any, model: Any, move: str) -> None:
    other = MOVES[move](model)
    logits(other)
    fastskip.set_policy(other, SKIP_ALL_FFN)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_equal_parameters(model, stock)
    assert_same_logits(model, stock)
    assert fastskip.plan_of(model).is_dense and not fastskip.plan_of(other).is_dense
    assert not logits(other).any()


SKIP_ALL_FFN = {"schema_version": 1, "rules": [{"layers": ":", "tokens": "all", "skip": ["ffn"]}]}


def double_in_place(module: nn.Linear) -> None:
    module.weight.detach().mul_(2)


CHANGES: dict[str, Callable[[nn.Linear], None]] = {
    "replaced": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
    "data replaced": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "in place": lambda m: double_in_place(m),
    "bias replaced": lambda m: setattr(m, "bias", nn.Parameter(m.bias.detach() + 1)),
}


@pytest.mark.parametrize(
    "name", ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changed_parameters_are_used(
    stock: Any, model: Any, change: Callable[[nn.Linear], None], name: str
) -> None:
    before = logits(model)
    for changed in (stock, model):
        layer = changed.model.layers[1]
        part = layer.mlp if hasattr(layer.mlp, name) else layer.self_attn
        change(getattr(part, name))
    assert_same_logits(model, stock)
    assert (logits(model) - before).abs().max() > 1e-2


def test_changed_norm_is_used(stock: Any, model: Any) -> None:
    for changed in (stock, model):
        norm = changed.model.layers[2].post_attention_layernorm
        norm.weight = nn.Parameter(norm.weight.detach() + 1)
    assert_same_logits(model, stock)


def test_optimizer_step_is_visible(stock: Any, model: Any) -> None:
    for trained in (stock, model):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        trained(input_ids=ids(), labels=ids()).loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    assert is_merged(model)
    assert_same_logits(model, stock)


HOOKED = [
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.act_fn",
    "mlp",
    "input_layernorm",
]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_called(stock: Any, model: Any, name: str) -> None:
    calls = []

    def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output * 2

    handles = [
        m.model.layers[1].get_submodule(name).register_forward_hook(double) for m in (stock, model)
    ]
    assert_same_logits(model, stock)
    assert model.model.layers[1].get_submodule(name) in calls
    for handle in handles:
        handle.remove()
    calls.clear()
    assert_same_logits(model, stock)
    assert not calls


def test_a_wrapped_forward_is_called(stock: Any, model: Any) -> None:
    """`accelerate` hooks a module by giving it a `forward` of its own."""
    for changed in (stock, model):
        up = changed.model.layers[1].mlp.up_proj
        up.forward = lambda x, inner=up.forward: inner(x) * 2
    assert_same_logits(model, stock)


def test_a_weight_of_another_kind_is_left_alone(stock: Any, model: Any) -> None:
    """Quantised weights are subclasses of `Parameter` inside a plain `nn.Linear`."""

    class Other(nn.Parameter):
        pass

    up = model.model.layers[1].mlp.up_proj
    up.weight = Other(up.weight.detach().clone())
    assert_same_logits(model, stock)
    assert type(up.weight) is Other and up.weight.storage_offset() == 0


def test_the_plans_table_notes_layers_that_run_one_by_one(model: Any) -> None:
    plan = fastskip.plan_of(model)
    assert "note" not in plan.table()
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    noted = fastskip.plan_of(model)
    lines = noted.table().splitlines()
    assert lines[0].endswith("note")
    assert [line.split()[0] for line in lines[1:]] == ["0-1", "2", "3"]
    assert [line.endswith("projections one by one") for line in lines[1:]] == [False, True, False]
    assert noted == plan and noted.fingerprint == plan.fingerprint
    handle.remove()
    assert fastskip.plan_of(model).table() == plan.table()


def test_tied_embeddings_stay_tied() -> None:
    model: Any = fastskip.apply_(tiny_llava(tied=True))
    again = pickle.loads(pickle.dumps(model))
    for tied in (model, copy.deepcopy(model), again):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    inputs = random_batch(model).inputs()
    assert torch.equal(
        again.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4)
    )
