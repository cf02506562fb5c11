"""Models that bitsandbytes quantised, against Hugging Face hooks on the same quantised modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import fastskip
from fastskip.commands.common import Dtype, config_of, load_plain
from fastskip.families import UnsupportedModelError
from fastskip.plan.costs import prefill_cost
from fastskip.policy import TokenClass
from fastskip.sparse.matrices import SparseError, matrices
from fastskip.study.bench.contenders import Models
from fastskip.verification.cells import IMAGE
from fastskip.verification.check import verify
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio, generate
from tests.batches import random_batch
from tests.budget import assert_within_budget
from tests.models import tiny_llava
from tests.policies import CELLS, MIXED, Policy, cell_policy, policy_of, skip
from tests.removals.removing import removal, removing
from tests.routing.routed import check_forward, routed, similarity

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

# What is not of the decoder's layers stays plain, and is smaller than bitsandbytes takes on a CPU.
APART = {"llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]}
FORMS: dict[str, dict[str, Any]] = {
    "nf4": APART | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": APART | {"load_in_8bit": True},
}
ROWS = [TokenClass.IMAGE] * 4 + [TokenClass.TEXT] * 3
POLICIES = {
    "dense": policy_of(),
    **{f"{cell} of images": cell_policy(cell, "image", "middle") for cell in CELLS},
    "blocks of all": policy_of(skip([1, 2], "all", "block")),
    "own rules": MIXED["each class its own rule"],
    "parallel": MIXED["parallel, skipped branches"],
    "pairs": MIXED["pair and skips"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with plain weights."""
    path = tmp_path_factory.mktemp("plain")
    model = tiny_llava(hidden=64, head_dim=16, ffn=128)
    with torch.no_grad():  # as `Trio` has it
        model.get_output_embeddings().weight[-2:] = 0
    model.save_pretrained(path)
    return path


def stock(folder: Path, form: str) -> Any:
    """Hugging Face's model, quantised as it is loaded."""
    options = {"quantization_config": BitsAndBytesConfig(**FORMS[form])}
    return LlavaForConditionalGeneration.from_pretrained(folder, **options).eval()


def ours(folder: Path, form: str, policy: Any = None, **options: Any) -> Any:
    options["quantization_config"] = BitsAndBytesConfig(**FORMS[form])
    return fastskip.load_model(folder, policy, **options)


@pytest.fixture(scope="module", params=FORMS)
def trio(request: pytest.FixtureRequest, folder: Path) -> Trio:
    """The truth is what the quantised weights stand for, in fp64."""
    # Before any forward, as that may pack weights anew.
    exact = stock(folder, request.param).dequantize().to(torch.float64)
    prepared = ours(folder, request.param)
    return Trio(stock(folder, request.param), exact=exact, prepared=prepared)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_policies_compute_what_they_mean(trio: Trio, policy: Policy) -> None:
    trio.check_forward(policy, random_batch(trio.plain, 3))


# Not int8, which rounds activations too, so that a last digit may turn a token.
@pytest.mark.parametrize("trio", ["nf4"], indirect=True, scope="module")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_greedy_tokens_are_those_of_the_masked_computation(trio: Trio, policy: Policy) -> None:
    trio.check_greedy(policy, random_batch(trio.plain, 3, padding="left"))


DECIDING = {
    "removal": removing(removal(1, "attention", tokens=["image"])),
    "router": routed(similarity([1, 2], ["image", "text"], threshold=0.9)),
}


@pytest.mark.parametrize("policy", DECIDING.values(), ids=DECIDING.keys())
def test_rows_that_leave_or_decide(trio: Trio, policy: Policy) -> None:
    decided = check_forward(trio, policy, random_batch(trio.plain, 4))
    assert any(bool(mask.any()) for mask in decided.values())


@pytest.mark.parametrize("form", FORMS)
def test_skipped_rows_are_in_no_product(folder: Path, form: str) -> None:
    model = ours(folder, form, cell_policy("block-omit", "image", "all"))
    batch = random_batch(model, 2)
    seen: list[int] = []
    product = model.model.language_model.layers[1].mlp.down_proj
    assert type(product).__module__.startswith("bitsandbytes")
    with torch.no_grad(), product.register_forward_pre_hook(_noting(seen)):
        model(**batch.inputs())
    rows = int((batch.real & (batch.token_classes != IMAGE)).sum())
    assert seen == [rows]


def _noting(seen: list[int]) -> Any:
    return lambda module, inputs: seen.append(inputs[0].numel() // inputs[0].shape[-1])


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_one_is_loaded_as_it_was(folder: Path, tmp_path: Path, form: str) -> None:
    model = ours(folder, form, "image_ffn")
    # Before any forward: bitsandbytes 0.50 writes others where a CPU has packed its weights.
    model.save_pretrained(tmp_path)
    again = fastskip.load_model(tmp_path)
    assert fastskip.plan_of(again).policy.name == "image_ffn"
    batch = random_batch(model, 2)
    assert torch.equal(generate(again, batch), generate(model, batch))


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_one_is_loaded_on_its_device(
    folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every command: on CUDA, some quantised models cannot be moved."""
    ours(folder, form).save_pretrained(tmp_path)

    def move(model: Any, *_: Any) -> None:
        raise ValueError("`.to` is not supported")

    monkeypatch.setattr(LlavaForConditionalGeneration, "to", move)
    path = str(tmp_path)
    found = Models.load(path, device=torch.device("cpu"))
    for model in (found.hf, load_plain(path, config_of(path), Dtype.AUTO, "cpu")):
        assert type(model) is LlavaForConditionalGeneration and not model.training
        module = model.model.language_model.layers[1].mlp.down_proj
        assert type(module).__module__.startswith("bitsandbytes")


def test_costs_count_the_bytes_that_are_held(folder: Path) -> None:
    plain = fastskip.plan_of(fastskip.load_model(folder))
    assert plain.shape.projection_bytes is None and plain.shape.weight_bytes == 4
    read = {"plain": prefill_cost(plain, ROWS).weight_bytes}
    for form, least, most in (("nf4", 0.5, 0.75), ("int8", 1.0, 1.25)):
        plan = fastskip.plan_of(ours(folder, form))
        assert least < plan.shape.weight_bytes < most
        read[form] = prefill_cost(plan, ROWS).weight_bytes
    assert read["nf4"] < read["int8"] < read["plain"]


def test_dequantised_it_runs_the_merged_products(folder: Path) -> None:
    model = ours(folder, "nf4", "image_ffn").dequantize()
    plan = fastskip.plan_of(model)
    assert plan.shape.projection_bytes is None and not plan.notes
    expected = fastskip.apply_(stock(folder, "nf4").dequantize(), "image_ffn")
    batch = random_batch(model, 2)
    assert torch.equal(generate(model, batch), generate(expected, batch))


def test_adapters_are_trained_on_it(folder: Path) -> None:
    """Gradients of LoRA are those of the masked computation: QLoRA."""
    policy = cell_policy("ffn", "image", "middle")
    exact = stock(folder, "nf4").dequantize().to(torch.float64)
    bases = ours(folder, "nf4", policy), stock(folder, "nf4"), exact
    found = []
    for base in bases:
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapters = {
            n: p for n, p in wrapped.named_parameters() if "language_model" in n and "lora_" in n
        }
        generator = torch.Generator().manual_seed(0)
        for adapter in adapters.values():
            adapter.data = torch.randn(adapter.shape, generator=generator).to(base.dtype) / 4
        batch = random_batch(base, 4)
        if base is bases[0]:
            logits = base(**batch.inputs()).logits
        else:
            with MaskedOracle(base, policy) as oracle:
                logits = oracle.forward(**batch.inputs())
        logits[batch.real].square().mean().backward()
        found.append({name: adapter.grad for name, adapter in adapters.items()})
    got, eager, truth = found
    assert len(got) == 2 * 4
    for name, gradient in got.items():
        assert gradient.abs().max() > 0
        assert_within_budget(name, gradient, eager[name], truth[name])


REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "impl": (
        lambda folder: ours(folder, "nf4", impl="torch"),
        UnsupportedModelError,
        "impl: 'torch'.*None or 'reference'",
    ),
    "sparse in memory": (
        lambda folder: ours(folder, "nf4", weights="bitmap"),
        SparseError,
        r"layers\.0\.self_attn\.q_proj: a bitsandbytes.*plain linears",
    ),
    "pruning": (
        lambda folder: [matrix.weight for matrix in matrices(ours(folder, "nf4"))],
        SparseError,
        r"q_proj: held as Params4bit.*dequantize",
    ),
    "verify": (
        lambda folder: verify(stock(folder, "nf4"), "image_ffn", {}),
        UnsupportedModelError,
        "quantization_config: 'a quantised model'.*dequantize",
    ),
}


@pytest.mark.parametrize(("act", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_needs_plain_weights_says_so(
    folder: Path, act: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        act(folder)
