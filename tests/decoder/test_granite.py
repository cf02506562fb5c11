"""Granite: embeddings, scores, what sublayers add and logits are multiplied by numbers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteForCausalLM
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.families import text_model_of
from fastskip.generation.guarding import Guarding
from fastskip.kernels import tuning
from fastskip.kernels.tuning import Table
from fastskip.ops.account import counted
from fastskip.verification.check import verify
from fastskip.verification.exact import compute_in_double
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.checkpoints import save_checkpoint
from tests.decoder.test_gradients import compare, oracle_gradients
from tests.device.interpreted import STREAM, TENSOR
from tests.generation.test_drop_in import Edit, check_followed, told
from tests.models import tiny_llava, tiny_text_only
from tests.policies import MIXED, Policy, pair, policy_of, skip
from tests.removals.removing import removal, removing
from tests.routing.routed import check_forward, check_generate, random, routed, similarity

IMPLS = ["reference", "torch"]
NEW = 3
POLICIES: dict[str, Policy] = {
    "dense": policy_of(),
    **MIXED,
    "a unimodal mask": policy_of() | {"masks": [{"layers": ":2", "kind": "unimodal"}]},
}
"""Of these, the device executor refuses the last one."""
ROUTED: dict[str, Policy] = {
    "blocks": routed(random("1:3", "all", kv="project")),
    "attention": routed(random([1, 2], "all", "attention", kv="omit")),
    "by similarity": routed(similarity("1:4", "all", threshold=0.9)),
    "by what an FFN changes": routed(
        similarity("1:", "all", "ffn", threshold=0.6, measure="change")
    ),
    "parallel": routed(random([1], "all"), arrangements=[{"layers": [1], "kind": "parallel"}]),
    "parallel, apart": routed(
        random([1], "all", "attention"),
        random([1], "all", "ffn", seed=2),
        arrangements=[{"layers": [1], "kind": "parallel"}],
    ),
    "around a pair": routed(random([0, 3]), arrangements=(pair([[1, 2]], "mean"),)),
    "attention that attended": removing(removal(1, "attention"), removal(2, "next_attention")),
}


def vision(**sizes: Any) -> Any:
    """As granite-vision's checkpoints, whose head is LLaVA-NeXT's."""
    return tiny_llava("llava_next_granite", **sizes)


@pytest.fixture(scope="module", params=IMPLS)
def trio(request: pytest.FixtureRequest) -> Trio:
    return Trio(vision(attention_bias=True, mlp_bias=True), request.param)


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, 3, images=(1, 0, 2))


@pytest.mark.parametrize("name", POLICIES)
def test_cells(trio: Trio, batch: Batch, name: str) -> None:
    if "unimodal" in name and trio.prepared._fastskip.decoder.ops.fused is not None:
        pytest.skip("the device executor has no unimodal masks")
    trio.check_forward(POLICIES[name], batch)
    trio.check_greedy(POLICIES[name], batch)


@pytest.mark.parametrize("name", ROUTED)
def test_decisions(trio: Trio, batch: Batch, name: str) -> None:
    check_forward(trio, ROUTED[name], batch)
    _, masks = check_generate(trio, ROUTED[name], batch)
    assert any(mask.any() for mask in masks.values())


@pytest.mark.parametrize("guarding", list(Guarding))
def test_guarded_steps(guarding: Guarding) -> None:
    """A loop over layers multiplies nothing, so there is none."""
    trio = Trio(vision(), "torch")
    trio.prepared._fastskip.steps.guarding = guarding
    batch = random_batch(trio.plain, 1, images=(1,))
    for name in ("blocks", "attention", "parallel"):
        check_generate(trio, ROUTED[name], batch, NEW)


def test_halves_of_norms() -> None:
    trio = Trio(vision(), "torch")
    trio.prepared._fastskip.steps.halves = True
    trio.check_greedy(policy_of(skip([1], "all", "ffn")), random_batch(trio.plain, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("build", [vision, lambda: tiny_text_only("granite")])
def test_logits_are_those_that_samplers_read(build: Callable[[], Any], impl: str) -> None:
    """Of all steps; processors and draws depend on them, which greedy tokens do not."""
    plain = build()
    ours = fastskip.apply_(copy.deepcopy(plain), impl=impl)
    images = (1, 0) if plain.config.model_type != "granite" else (0, 0)
    batch = random_batch(plain, 5, images=images)
    returned = dict.fromkeys(("return_dict_in_generate", "output_logits", "output_scores"), True)
    drawn = {"max_new_tokens": 6, "do_sample": True, "top_k": 9, "temperature": 0.7}
    found = []
    for model in (ours, plain):
        torch.manual_seed(1)
        found.append(model.generate(**batch.inputs(), **returned, **drawn))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for name in ("logits", "scores"):
        both = [torch.stack(getattr(each, name)) for each in found]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "table", "halves"),
    [
        ("dense", STREAM, True),
        ("each class its own rule", TENSOR, False),
        ("parallel, shared", STREAM, False),
        ("pairs to the end", STREAM, False),
    ],
)
def test_token_for_token_on_kernels(name: str, table: Table, halves: bool) -> None:
    trio = Trio(vision(hidden=48, ffn=72, head_dim=16), impl="triton")
    trio.prepared._fastskip.steps.halves = halves
    batch, policy = random_batch(trio.plain, 3, images=(1, 0)), POLICIES[name]
    tokens = greedy(trio.plain, policy, batch, NEW)
    with tuning.table(table), counted() as account:
        assert torch.equal(generate(trio.under(policy), batch, NEW), tokens)
    assert account.by_kernel["head"][0] == NEW - 1  # every step ran on kernels


@pytest.mark.parametrize("name", ["blocks", "parallel"])
def test_decisions_on_kernels(name: str) -> None:
    trio = Trio(vision(hidden=48, ffn=72, head_dim=16), impl="triton")
    with tuning.table(STREAM):
        check_generate(trio, ROUTED[name], random_batch(trio.plain, 3, images=(1, 0)), 2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logits_of_steps_by_itself(impl: str) -> None:
    """Where steps leave logits, rather than the token that they choose."""
    plain = tiny_text_only("granite")
    ours, batch = fastskip.apply_(copy.deepcopy(plain), impl=impl), random_batch(plain, images=(0,))
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}
    with tuning.table(STREAM):
        both = [each.generate(**batch.inputs(), **options).logits for each in (ours, plain)]
    torch.testing.assert_close(*map(torch.stack, both), rtol=1e-4, atol=1e-4)


def test_logits_that_routers_read() -> None:
    """Through the logit lens: those of the model on what leaves its last layer."""
    model = fastskip.apply_(tiny_text_only("granite"))
    with torch.no_grad():
        found = model(torch.arange(3, 9)[None], output_hidden_states=True)
        read = model._fastskip.decoder.lens(found.hidden_states[-1][0], False)
    torch.testing.assert_close(read, found.logits[0])


@pytest.mark.parametrize("name", ["each class its own rule", "parallel, own", "pair, mean"])
def test_gradients(name: str) -> None:
    plain = vision(dtype=torch.float64)
    ours = fastskip.apply_(copy.deepcopy(plain))
    compute_in_double(text_model_of(ours), lambda handle: None)
    batch = random_batch(plain, 1, images=(2, 0, 1))
    compare(ours, MIXED[name], batch, oracle_gradients(plain, MIXED[name], batch))


def scale_embeddings(model: Any) -> None:
    model.model.embedding_multiplier = -2.0


def scale_changes(model: Any) -> None:
    model.model.layers[2].residual_multiplier = -1.5


def scale_scores(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 3.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("edit", [scale_embeddings, scale_changes, scale_scores])
def test_changes_to_numbers_are_followed(edit: Edit, impl: str) -> None:
    stock = tiny_text_only("granite")
    check_followed((stock, fastskip.apply_(copy.deepcopy(stock), impl=impl)), edit)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_change_of_the_heads_number_is_followed(impl: str) -> None:
    stock = tiny_text_only("granite")
    ours = fastskip.apply_(copy.deepcopy(stock), impl=impl)
    options = {"do_sample": True, "max_new_tokens": 8}
    found = []
    for scaling in (3.0, 0.1):
        for model in (stock, ours):
            model.config.logits_scaling = scaling
            torch.manual_seed(0)
            found.append(model.generate(torch.tensor([[5, 6, 7]]), **options).tolist())
    assert found[0] == found[1] != found[2] == found[3]


def test_pairs_whose_layers_differ() -> None:
    """Each layer's change has its own number; kernels add both at once."""
    plain = vision()
    plain.model.language_model.layers[1].residual_multiplier = 0.2
    policy = MIXED["pair, sum"]
    trio, batch = Trio(plain), random_batch(plain, 2)
    trio.check_forward(policy, batch)
    with pytest.raises(fastskip.UnsupportedModelError, match="residual_multiplier"):
        fastskip.apply_(copy.deepcopy(plain), policy, impl="torch")
    dense = fastskip.apply_(copy.deepcopy(plain), impl="torch")
    with pytest.raises(fastskip.UnsupportedModelError, match="residual_multiplier"):
        fastskip.set_policy(dense, policy)


@pytest.mark.parametrize("scaling", [0, -8.0])
def test_logits_without_an_order(scaling: float) -> None:
    plain = tiny_text_only("granite")
    plain.config.logits_scaling = scaling
    with pytest.raises(fastskip.UnsupportedModelError, match="logits_scaling.*: more than 0"):
        fastskip.apply_(plain)


def test_loading_by_itself(tmp_path: Path) -> None:
    stock = tiny_text_only("granite")
    fastskip.apply_(copy.deepcopy(stock), MIXED["pair, mean"]).save_pretrained(tmp_path)
    ours, again = fastskip.load_model(tmp_path), GraniteForCausalLM.from_pretrained(tmp_path)
    assert fastskip.plan_of(ours).policy == fastskip.SkipPolicy.from_dict(MIXED["pair, mean"])
    assert told(again) == told(stock)
    assert told(fastskip.set_policy(ours, policy_of())) == told(stock)


def test_hidden_states_and_losses() -> None:
    plain = tiny_text_only("granite")
    ours, ids = fastskip.apply_(copy.deepcopy(plain)), torch.arange(3, 12)[None]
    given = {"input_ids": ids, "labels": ids, "output_hidden_states": True}
    with torch.no_grad():
        found, expected = ours(**given), plain(**given)
    torch.testing.assert_close(found.loss, expected.loss)
    for own, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [vision, lambda: tiny_text_only("granite")])
def test_verification_holds(build: Callable[[], Any]) -> None:
    model = build()
    images = (1, 0) if model.config.model_type != "granite" else (0, 0)
    inputs = random_batch(model, 2, images=images).inputs()
    for name in ("parallel, own", "pair, mean"):
        assert verify(model, MIXED[name], inputs, max_new_tokens=4).holds


def test_the_plan_of_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llava_next_granite")
    found = CliRunner().invoke(app, ["plan", "-m", str(tmp_path), "-p", "image_ffn"])
    assert found.exit_code == 0, found.output
    assert "layer" in found.output
