"""Which implementation runs, what it needs, and where the device executor hands over."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip import ops
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.ops import Implementation, Operations, fused
from tests.agreement import answer_labels, generate
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget, truth_copy
from tests.device.conftest import IMPL
from tests.models import tiny_llama, tiny_llava
from tests.policies import MIXED, policy_of

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))
ALL = MIXED["each class its own rule"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton implementation, importable here."""
    pytest.importorskip("triton")
    return pytest.importorskip("fastskip.ops.compiled")


@pytest.fixture
def resolve(request: pytest.FixtureRequest) -> Callable[..., Operations]:
    if request.config.option.impl is not None:
        pytest.skip("--impl changes what no choice means")
    return ops.resolve


def interpret(monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
    """As if kernels had been made for the interpreter, or for a GPU."""
    from fastskip.kernels import numerics

    monkeypatch.setattr(numerics, "INTERPRETED", type(numerics.INTERPRETED)(is_on))


def capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


def test_no_choice(
    resolve: Callable[..., Operations], compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(None, CPU).implementation is Implementation.REFERENCE
    assert resolve(None, CPU).fused is None
    capability(monkeypatch, 8, 0)
    assert resolve(None, CUDA).implementation is Implementation.TRITON
    assert resolve(None, CUDA).fused is compiled


@pytest.mark.parametrize("device", [CPU, CUDA, META])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_what_runs_anywhere(name: str, device: torch.device) -> None:
    operations = ops.resolve(name, device)
    assert operations.implementation.value == name
    assert operations.fused is (fused if name == "torch" else None)
    assert ops.resolve(Implementation(name), device) is operations


@pytest.mark.parametrize("name", ["cuda", "", "Triton", "eager"])
def test_unknown_names(name: str) -> None:
    said = rf"impl: '{name}' is unknown; allowed: \['reference', 'triton', 'torch'\]"
    with pytest.raises(ValueError, match=said):
        ops.resolve(name, CPU)
    with pytest.raises(ValueError, match=said):
        fastskip.apply_(tiny_llama(), impl=name)


def test_triton_without_its_interpreter(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch, False)
    said = r"impl: 'triton' runs on CUDA, but the model is on cpu .*TRITON_INTERPRET=1.*'torch'"
    with pytest.raises(ValueError, match=said):
        ops.resolve("triton", CPU)
    with pytest.raises(ValueError, match=said):
        fastskip.apply_(tiny_llama(), impl="triton")
    interpret(monkeypatch, True)
    assert ops.resolve("triton", CPU).fused is compiled
    with pytest.raises(
        ValueError, match="the model is on meta.*allowed here: 'reference', 'torch'"
    ):
        ops.resolve("triton", META)


def test_triton_on_an_old_gpu(
    resolve: Callable[..., Operations], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(monkeypatch, 7, 5)
    for impl in ("triton", None):
        with pytest.raises(
            ValueError, match=r"8\.0 or higher, but cuda has 7\.5; allowed here: 'ref"
        ):
            resolve(impl, CUDA)


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    for device in (CPU, CUDA):
        with pytest.raises(
            ValueError, match=r"fastskip\[gpu\].*allowed here: 'reference', 'torch'"
        ):
            ops.resolve("triton", device)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_operations_are_copied(name: str, copied: Any, compiled: Any) -> None:
    operations = ops.operations_of(Implementation(name))
    other = copied(operations)
    assert other == operations and other.fused is operations.fused


@pytest.fixture
def plain() -> Any:
    return tiny_llava(attention_bias=True)


@pytest.fixture
def model(plain: Any) -> Any:
    return fastskip.apply_(copy.deepcopy(plain), ALL, impl=IMPL)


@pytest.fixture
def batch(plain: Any) -> Batch:
    return random_batch(plain, seed=1, images=(2, 0, 1))


def is_fused(model: Any) -> bool:
    fused_now: bool = model._fastskip.fused_decoder.is_fused
    return fused_now


def reference_of(model: Any) -> Any:
    """The same weights under the same policy in the plain runtime."""
    other = tiny_llava(attention_bias=True)
    other.load_state_dict(model.state_dict())
    return fastskip.apply_(other, fastskip.plan_of(model).policy, impl="reference")


def test_gradients_are_the_plain_runtimes(model: Any, batch: Batch) -> None:
    labels, _ = answer_labels(batch)
    found = []
    for each in (model, reference_of(model)):
        each(**batch.inputs(), labels=labels).loss.backward()
        found.append([p.grad for p in each.parameters()])
    assert any(gradient is not None for gradient in found[0])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert not is_fused(model)
    with torch.no_grad():
        cache = model(**batch.inputs())[CACHE_NAME]
    assert is_fused(model) and isinstance(cache, PagedCache)


def test_a_training_step_is_seen(model: Any, batch: Batch) -> None:
    """Steps that were made before it read the new weights."""
    labels, _ = answer_labels(batch)
    before = generate(model, batch, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch.inputs(), labels=labels).loss.backward()
    optimizer.step()
    after = generate(model, batch, 6)
    assert torch.equal(after, generate(reference_of(model), batch, 6))
    assert not torch.equal(after, before)


def test_the_prompts_cache_of_a_training_forward(model: Any, batch: Batch) -> None:
    """It is the plain runtime's, and the plain runtime goes on with it."""
    cache = model(**batch.inputs())[CACHE_NAME]
    assert isinstance(cache, SkipCache) and not isinstance(cache, PagedCache)
    ids = torch.cat((batch.input_ids, torch.full((3, 1), 5)), dim=1)
    mask = torch.cat((batch.attention_mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4}
    other = reference_of(model)
    with torch.no_grad():
        theirs = other(**batch.inputs())[CACHE_NAME]
    expected = other.generate(**given, **{CACHE_NAME: theirs})
    assert torch.equal(model.generate(**given, **{CACHE_NAME: cache}), expected)
    assert is_fused(model)


PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp", "input_layernorm"]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_on_projections(model: Any, batch: Batch, name: str) -> None:
    """The plain runtime obeys them; without them the fused operations are back."""
    other = reference_of(model)
    before = generate(model, batch, 5)
    handles = []
    for each in (model, other):
        module = each.get_decoder().layers[1].get_submodule(name)
        handles.append(module.register_forward_hook(lambda _m, _i, out: out * 1.5))
    hooked = generate(model, batch, 5)
    assert not is_fused(model)
    assert torch.equal(hooked, generate(other, batch, 5))
    with torch.no_grad():
        logits = [each(**batch.inputs()).logits[batch.real] for each in (model, other)]
    assert torch.equal(*logits)
    for handle in handles:
        handle.remove()
    assert torch.equal(generate(model, batch, 5), before)
    assert is_fused(model)


def test_a_cache_from_before_a_hook(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        cache = model(**batch.inputs())[CACHE_NAME]
    ids = torch.cat((batch.input_ids, torch.full((3, 1), 5)), dim=1)
    given = {"input_ids": ids, CACHE_NAME: cache, "max_new_tokens": 3}
    given["attention_mask"] = torch.cat((batch.attention_mask, torch.ones(3, 1).long()), dim=1)
    expected = model.generate(**{**given, CACHE_NAME: copy.deepcopy(cache)})
    handle = model.get_decoder().layers[2].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="were merged.*start again from the whole prompt"):
        model.generate(**given)
    handle.remove()
    cache.crop(batch.columns)
    assert torch.equal(model.generate(**given), expected)


def test_a_cache_from_under_a_hook(model: Any, batch: Batch) -> None:
    """The plain runtime's cache goes on in the plain runtime."""
    handle = model.get_decoder().layers[2].mlp.down_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        cache = model(**batch.inputs())[CACHE_NAME]
    handle.remove()
    assert not isinstance(cache, PagedCache)
    ids = torch.cat((batch.input_ids, torch.full((3, 1), 5)), dim=1)
    mask = torch.cat((batch.attention_mask, torch.ones(3, 1).long()), dim=1)
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3}
    with torch.no_grad():
        own = model(**batch.inputs())[CACHE_NAME]
    assert isinstance(own, PagedCache)
    said = [model.generate(**given, **{CACHE_NAME: each}) for each in (cache, own)]
    assert torch.equal(*said)


def test_adapters_on_projections() -> None:
    peft = pytest.importorskip("peft")
    pair = []
    for impl in (IMPL, None):
        stock: Any = tiny_llama()
        base = fastskip.apply_(stock, impl=impl) if impl else stock
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        wrapped = peft.get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2, generator=generator)
        pair.append(wrapped)
    ours, theirs = pair
    given = {"input_ids": torch.arange(10, 22).view(2, 6), "max_new_tokens": 6}
    expected = theirs.generate(**given)
    assert torch.equal(ours.generate(**given), expected)
    assert not is_fused(ours.base_model.model)
    merged, plain = (wrapped.merge_and_unload() for wrapped in pair)
    assert torch.equal(merged.generate(**given), plain.generate(**given))
    assert is_fused(merged)


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
def test_adapters_around_the_layers(part: str) -> None:
    """They may be switched off and on between steps, so no graph has them."""
    peft = pytest.importorskip("peft")
    pair = []
    for impl in (IMPL, None):
        stock: Any = tiny_llama()
        base = fastskip.apply_(stock, impl=impl) if impl else stock
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[part])).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.7, generator=generator)
        pair.append(wrapped)
    given = {"input_ids": torch.arange(10, 22).view(2, 6), "max_new_tokens": 6}
    adapted = [wrapped.generate(**given) for wrapped in pair]
    bare = []
    for wrapped in pair:
        with wrapped.disable_adapter():
            bare.append(wrapped.generate(**given))
    assert torch.equal(*adapted) and torch.equal(*bare)
    assert not torch.equal(adapted[0], bare[0])
    assert is_fused(pair[0].base_model.model)


def unusual_activation() -> Any:
    model: Any = tiny_llama(depth=2)
    for layer in model.get_decoder().layers:
        layer.mlp.act_fn = torch.nn.GELU()
    return model


WITHOUT_KERNELS = {
    "dtype torch.float64": lambda: tiny_llama(dtype=torch.float64),
    "head_dim 12": lambda: tiny_llama(head_dim=12),
    "hidden and FFN size 36, 48": lambda: tiny_llama(hidden=36),
    "activation of the FFN": unusual_activation,
}


@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_what_has_no_kernels(compiled: Any, name: str) -> None:
    stock = WITHOUT_KERNELS[name]()
    with pytest.raises(fastskip.UnsupportedModelError, match=f"impl='reference'.*{name}"):
        fastskip.apply_(stock, impl="triton")
    assert not hasattr(stock, "_fastskip")
    fastskip.apply_(stock, impl="reference")


def test_moved_to_a_dtype_without_kernels(compiled: Any) -> None:
    stock: Any = tiny_llama(depth=1, vocab=32)
    model, plain = (
        fastskip.apply_(copy.deepcopy(stock), impl=impl).double()
        for impl in ("triton", "reference")
    )
    with torch.no_grad():
        logits = [each(input_ids=torch.tensor([[3, 4, 5]])).logits for each in (model, plain)]
    assert torch.equal(*logits) and not is_fused(model)


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch.inputs()).logits
    return logits


def test_kernels_in_the_interpreter(compiled: Any) -> None:
    """A prompt and decode steps on the kernels themselves."""
    if not torch.cuda.is_available():
        from fastskip.kernels.numerics import INTERPRETED

        if not INTERPRETED.value:
            pytest.skip("needs Triton's interpreter")
    stock: Any = tiny_llama(depth=1, vocab=32)
    batch = random_batch(stock, seed=1, images=(0,), text=(3, 3))
    model = fastskip.apply_(copy.deepcopy(stock), policy_of(), impl="triton")
    said = generate(model, batch, 2)
    assert torch.equal(said, generate(stock, batch, 2)) and is_fused(model)
    plain, exact = logits_of(stock, batch), logits_of(truth_copy(stock), batch)
    assert_within_budget("logits", logits_of(model, batch), plain, exact, rows=batch.real)
