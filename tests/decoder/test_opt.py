"""OPT: LayerNorm, learned positions, a ReLU FFN and biases, under the same plans."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastskip
from fastskip import UnsupportedModelError
from fastskip.families import check_config, shape_of
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.plan import make_plan
from fastskip.plan.costs import decode_cost
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.verification.check import verify
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget
from tests.merging import ids, logits
from tests.models import tiny_llava, tiny_opt
from tests.policies import CELLS, MIXED, cell_policy, policy_of, skip
from tests.routing.routed import check_forward, check_generate, random, routed, similarity

ALL = MIXED["each class its own rule"]
IMPLS = ("reference", "torch")


@pytest.fixture(scope="module", params=IMPLS)
def trio(request: pytest.FixtureRequest) -> Trio:
    return Trio(tiny_llava("llava_opt"), request.param)


# The semantics table.


@pytest.mark.parametrize("token_class", ["image", "text", "generated"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(trio: Trio, batch: Batch, cell: str, token_class: str) -> None:
    layers = {"image": "first", "text": "middle", "generated": "last"}[token_class]
    policy = cell_policy(cell, token_class, layers)
    trio.check_forward(policy, batch)
    trio.check_greedy(policy, batch, 3)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_mixed_cells(trio: Trio, name: str, padding: Any) -> None:
    batch = random_batch(trio.plain, 2, images=(1, 0, 2), padding=padding, extra_columns=1)
    trio.check_forward(MIXED[name], batch)
    trio.check_greedy(MIXED[name], batch)


ROUTED = {
    "block, project": routed(random([1, 2], "all", "block", kv="project")),
    "block, omit": routed(random([0, 2], "all", "block", kv="omit")),
    "attention, reuse": routed(random([1, 3], ["text", "generated"], "attention", kv="reuse")),
    "FFN": routed(random("1:", ["text", "image"], "ffn")),
    "similarity": routed(similarity("1:4", "all", "block", threshold=0.9)),
}


@pytest.mark.parametrize("name", ROUTED)
def test_routers(trio: Trio, batch: Batch, name: str) -> None:
    masks = check_forward(trio, ROUTED[name], batch)
    assert any(bool(mask[batch.real].any()) for mask in masks.values())
    check_generate(trio, ROUTED[name], batch)


def test_verify_holds(batch: Batch) -> None:
    report = verify(tiny_llava("llava_opt"), ALL, batch.inputs(), max_new_tokens=3)
    assert report.holds, str(report)


# Positions.


@torch.no_grad()
def logits_of(model: Any, batch: Batch, **options: Any) -> Tensor:
    found: Tensor = model(**batch.inputs(), **options).logits[batch.real]
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
def test_pads_have_no_position(trio: Trio, padding: Any) -> None:
    """Without positions Hugging Face counts what the mask shows, not columns."""
    batch = random_batch(trio.plain, 3, images=(1, 0), padding=padding, extra_columns=2)
    model = trio.under(policy_of())
    eager, truth = logits_of(trio.plain, batch), logits_of(trio.exact, batch)
    assert_within_budget("logits", logits_of(model, batch), eager, truth)


def test_given_positions_are_used(trio: Trio, batch: Batch) -> None:
    positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0) * 3 + 7
    model = trio.under(policy_of())
    eager, truth = (
        logits_of(each, batch, position_ids=positions) for each in (trio.plain, trio.exact)
    )
    ours = logits_of(model, batch, position_ids=positions)
    assert_within_budget("logits", ours, eager, truth)
    assert not torch.allclose(ours, logits_of(model, batch), atol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sampler", [{}, {"renormalize_logits": True}], ids=["greedy", "logits"])
def test_the_last_position_and_the_one_after_it(impl: str, sampler: dict[str, Any]) -> None:
    stock = tiny_opt(max_position_embeddings=12)
    model = fastskip.apply_(copy.deepcopy(stock), impl=impl)
    given = {"input_ids": ids()[:1, :5], "do_sample": False, **sampler}
    # The last token is not fed, so it needs no position.
    expected = stock.generate(**given, max_new_tokens=8)
    assert torch.equal(model.generate(**given, max_new_tokens=8), expected)
    with pytest.raises(ValueError, match="position_ids: 12; allowed: 0 to 11"):
        model.generate(**given, max_new_tokens=9)
    # Who has ended needs none either, however many tokens were allowed.
    end = int(expected[0, -1])
    assert end not in expected[0, 5:-1]
    again = model.generate(**given, max_new_tokens=20, eos_token_id=end)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_prompt_that_is_too_long(impl: str) -> None:
    model = fastskip.apply_(tiny_opt(max_position_embeddings=5), impl=impl)
    with torch.no_grad():
        cache = model(input_ids=ids()[:, :4], use_cache=True)[CACHE_NAME]
        with pytest.raises(ValueError, match="position_ids: 5; allowed: 0 to 4"):
            model(input_ids=ids()[:, :2], **{CACHE_NAME: cache})
        assert cache.get_seq_length() == 4
        model(input_ids=ids()[:, :1], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="position_ids: -1; allowed"):
        model(input_ids=ids()[:, :1], position_ids=torch.tensor([[-1]]))


# Training.


def train_logits(model: Any) -> Tensor:
    out: Tensor = model.train()(input_ids=ids()).logits
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_in_training(kind: str, wants_gradient: bool, impl: str) -> None:
    """Of everything, so that nothing is left to chance."""
    fields: dict[str, Any] = {kind: 1.0}
    stock: Any = tiny_opt(**fields)
    models = fastskip.apply_(copy.deepcopy(stock), impl=impl), stock
    evaluated = logits(models[0])
    with torch.set_grad_enabled(wants_gradient):
        ours, theirs = (train_logits(model) for model in models)
    exact = train_logits(copy.deepcopy(stock).double())
    assert_within_budget("logits", ours, theirs, exact)
    assert not torch.allclose(ours, evaluated, atol=1e-2)
    for model in models:
        model.eval()
    assert torch.equal(logits(models[0]), evaluated)


def test_dropout_draws_anew() -> None:
    model = fastskip.apply_(tiny_opt(dropout=0.5))
    assert not torch.equal(train_logits(model), train_logits(model))


def test_layerdrop_is_refused_in_training() -> None:
    model = fastskip.apply_(tiny_opt(layerdrop=0.2))
    assert logits(model).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="layerdrop: 0.2.*0 in training"):
        train_logits(model)
    assert logits(model.eval()).isfinite().all()


# Configs.


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "norms after": ({"do_layer_norm_before": False}, "do_layer_norm_before: False .*: True"),
    "no final norm": ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm: True"),
    "norms without weights": (
        {"layer_norm_elementwise_affine": False},
        "layer_norm_elementwise_affine: False .*: True",
    ),
    "narrow embeddings": (
        {"word_embed_proj_dim": 16},
        r"word_embed_proj_dim: 16 .*hidden_size \(32\)",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_are_refused(name: str) -> None:
    fields, message = FORMS[name]
    model = tiny_opt(**fields)
    with pytest.raises(UnsupportedModelError, match=message):
        fastskip.apply_(model)
    assert logits(model).isfinite().all()  # left as it was


def test_tied_llava_is_refused() -> None:
    config: Any = tiny_llava("llava_opt").config
    for part, field in ((config, ""), (config.text_config, "text_config.")):
        part.tie_word_embeddings = True
        with pytest.raises(UnsupportedModelError, match=f"^{field}tie_word_embeddings: True"):
            check_config(config)
        part.tie_word_embeddings = False
    check_config(config)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_shape(has_bias: bool, tied: bool) -> None:
    """What plans count is what the model has."""
    model: Any = fastskip.apply_(tiny_opt(enable_bias=has_bias, tied=tied))
    shape = shape_of(model.config)
    assert not shape.gated_ffn and not shape.has_images and shape.max_positions == 256
    step = decode_cost(make_plan(SkipPolicy(), shape), {TokenClass.TEXT: 8})
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    held = sum(p.nbytes for module in linears for p in module.parameters())
    assert step.weight_bytes == held


@pytest.mark.parametrize("impl", IMPLS)
def test_cache_bytes_are_the_plans(impl: str) -> None:
    policy = policy_of(skip([1, 2], ["text"], "attention", kv="omit"), skip([3], "all", "block"))
    model = fastskip.apply_(tiny_opt(), policy, impl=impl)
    with torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True)[CACHE_NAME]
    plan = fastskip.plan_of(model)
    assert TokenClass.IMAGE not in plan.classes
    assert cache.live_bytes() == plan.kv_bytes(n_image=0, n_text=6, batch=2) > 0
