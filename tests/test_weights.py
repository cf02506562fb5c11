"""Merged projections: one storage, the checkpoint's parameters as views of it, never a wrong view."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastskip
from tests.batches import random_batch
from tests.models import tiny_llama, tiny_llava

GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


@pytest.fixture
def stock() -> Any:
    return tiny_llama(attention_bias=True, mlp_bias=True)


@pytest.fixture
def model(stock: Any) -> Any:
    return fastskip.apply_(copy.deepcopy(stock))


def ids() -> Tensor:
    return torch.arange(10, 22).view(2, 6)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=ids()).logits
    return out


def assert_same_logits(actual: Any, expected: Any) -> None:
    """Two models with the same weights, one of them possibly merged."""
    torch.testing.assert_close(logits(actual), logits(expected), rtol=0, atol=2e-4)


def groups(model: Any) -> Iterator[list[nn.Linear]]:
    for layer in model.get_decoder().layers:
        for part, names in GROUPS.items():
            yield [getattr(getattr(layer, part), name) for name in names]


def is_merged(model: Any) -> bool:
    """Whether all weights and biases of each group lie one after the other in one storage."""
    return all(
        before.data_ptr() + before.nbytes == after.data_ptr()
        and before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        for modules in groups(model)
        for name in ("weight", "bias")
        for before, after in zip(
            [getattr(module, name) for module in modules[:-1]],
            [getattr(module, name) for module in modules[1:]],
            strict=True,
        )
    )


def assert_equal_parameters(actual: Any, expected: Any) -> None:
    named = dict(expected.named_parameters())
    assert dict(actual.named_parameters()).keys() == named.keys()
    for name, parameter in actual.named_parameters():
        assert torch.equal(parameter, named[name]), name


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
    held = []
    from fastskip.decoder import weights

    def watched(*arguments: Any) -> Tensor:
        made: Tensor = empty(*arguments)
        live = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        held.append(sum(live.values()) + made.nbytes)
        return made

    empty = weights.empty
    monkeypatch.setattr(weights, "empty", watched)
    fastskip.apply_(stock)
    assert len(held) == layers * 4
    assert max(held) <= total + total / layers


MOVES: dict[str, Callable[[Any], Any]] = {
    "to the same dtype": lambda m: m.to(torch.float32),
    "to the same device": lambda m: m.to("cpu"),
    "there and back": lambda m: m.to(torch.float64).to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch_save_and_load(m),
    "load_state_dict": lambda m: load(m, m.state_dict()),
    "load_state_dict assign": lambda m: load(m, m.state_dict(), assign=True),
}


def torch_save_and_load(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def load(model: Any, state: dict[str, Tensor], **options: Any) -> Any:
    model.load_state_dict(state, strict=True, **options)
    return model


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
    torch.testing.assert_close(logits(model), logits(stock.double()), rtol=0, atol=2e-4)
    assert is_merged(model) and logits(model).dtype == torch.float64


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

CHANGES: dict[str, Callable[[nn.Linear], None]] = {
    "replaced": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
    "data replaced": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "in place": lambda m: m.weight.detach().mul_(2),
    "bias replaced": lambda m: setattr(m, "bias", nn.Parameter(m.bias.detach() + 1)),
}


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
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


HOOKED = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp", "input_layernorm"]


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


class TestStateDict:
    def test_tensors_have_storages_of_their_own(self, stock: Any, model: Any) -> None:
        state, expected = model.state_dict(), stock.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)

    @pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
    def test_after_a_move(self, model: Any, move: Callable[[Any], Any]) -> None:
        moved = move(model)
        logits(moved)
        for name, tensor in moved.state_dict().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        # However often a layer was merged, its tensors are copied once.
        hooks = [len(m._state_dict_hooks) for modules in groups(moved) for m in modules]
        assert set(hooks) == {1}

    def test_parameters_leave_as_they_are(self, model: Any) -> None:
        state, named = model.state_dict(keep_vars=True), dict(model.named_parameters())
        assert all(state[name] is parameter for name, parameter in named.items())
        assert is_merged(model)

    def test_accelerate_saves_every_key(self, stock: Any, model: Any, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator().save_model(model, str(tmp_path))
        accelerate.utils.save(model.state_dict(), tmp_path / "state", safe_serialization=True)
        expected = stock.state_dict()
        for file in (tmp_path / "model.safetensors", tmp_path / "state"):
            saved = load_file(file)
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[name], expected[name]) for name in saved)


class TestLora:
    """peft's adapters on a prepared model, against the same adapters on the untouched one."""

    @pytest.fixture
    def adapted(self, stock: Any, model: Any) -> tuple[Any, Any]:
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        pair = []
        for base in (model, stock):
            config = peft.LoraConfig(r=2, target_modules=targets, layers_to_transform=[1, 2])
            wrapped = peft.get_peft_model(base, config).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in wrapped.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(0, 0.2, generator=generator)
            pair.append(wrapped)
        return pair[0], pair[1]

    def test_adapters_are_used(self, adapted: tuple[Any, Any]) -> None:
        ours, theirs = adapted
        assert_same_logits(ours, theirs)
        with ours.disable_adapter():
            plain = logits(ours)
        assert (plain - logits(ours)).abs().max() > 1e-2
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = theirs.generate(input_ids=ids(), **options)
        assert torch.equal(ours.generate(input_ids=ids(), **options), expected)

    def test_merging_them_in(self, adapted: tuple[Any, Any]) -> None:
        ours, theirs = (wrapped.merge_and_unload() for wrapped in adapted)
        assert_same_logits(ours, theirs)
        assert is_merged(ours)

    def test_they_are_trained(self, adapted: tuple[Any, Any]) -> None:
        gradients = []
        for wrapped in adapted:
            wrapped(input_ids=ids(), labels=ids()).loss.backward()
            gradients.append(
                {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
            )
        ours, theirs = gradients
        assert ours.keys() == theirs.keys() and len(ours) == 2 * 5 * 2
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)


def test_tied_embeddings_stay_tied() -> None:
    model: Any = fastskip.apply_(tiny_llava(tied=True))
    again = pickle.loads(pickle.dumps(model))
    for tied in (model, copy.deepcopy(model), again):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    inputs = random_batch(model).inputs()
    assert torch.equal(
        again.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4)
    )
