"""What a prepared `forward` can be asked for: rows, states, losses, families, dtypes."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastskip
from fastskip.decoder import attention
from fastskip.families import text_model_of
from fastskip.verification.cells import TEXT
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio, answer_labels
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget
from tests.models import Kind, tiny_llama, tiny_llava, tiny_opt
from tests.policies import pair, parallel, policy_of, skip

CLASSES_DIFFER = policy_of(
    skip("1:3", ["image"], "block", kv="reuse"),
    skip([2], ["text"], "attention", kv="omit"),
    skip([0, 3], ["generated"], "ffn"),
)
POLICIES = {
    "dense": policy_of(),
    "classes differ": CLASSES_DIFFER,
    "last layer": policy_of(
        skip([3], ["image"], "attention", kv="project"), skip([3], ["text"], "ffn")
    ),
    "last layer left out": policy_of(skip([3], ["text"], "block", kv="omit")),
    "parallel at the end": policy_of(
        skip([3], ["text"], "ffn"), arrangements=(parallel([2]), parallel([3], "shared"))
    ),
    "pair at the end": policy_of(
        skip([0], ["image"], "block"), arrangements=(pair([[2, 3]], "mean"),)
    ),
}


@pytest.fixture(scope="module", params=["left", "right"])
def batch(trio: Trio, request: pytest.FixtureRequest) -> Batch:
    # Two columns more than needed: with right padding the last column is nobody's.
    return random_batch(
        trio.plain, seed=2, images=(1, 0, 2), padding=request.param, extra_columns=2
    )


@pytest.mark.parametrize("name", POLICIES)
def test_only_wanted_rows_pass_the_last_layer(trio: Trio, batch: Batch, name: str) -> None:
    policy, inputs = POLICIES[name], batch.inputs()
    eager, truth = trio.expected(policy, **inputs)
    model = trio.under(policy)
    some = torch.tensor([1, batch.columns - 1, batch.columns - 3])
    for keep in (1, 2, 5, batch.columns, batch.columns + 9, some):
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=keep).logits
        columns = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        rows = batch.real[:, columns]
        assert logits.isfinite().all()
        if rows.any():
            assert_within_budget(
                f"logits_to_keep={keep}", logits, eager[:, columns], truth[:, columns], rows=rows
            )


@pytest.mark.parametrize("name", POLICIES)
def test_sequences_that_are_alike(trio: Trio, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with their images in the same places attend together, wherever their rows lie."""
    one = random_batch(trio.plain, seed=3, images=(2,), text=(6, 6))
    ids = one.input_ids.repeat(3, 1)
    words = torch.randint(1, 60, ids.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(
        one,
        input_ids=torch.where(one.token_classes == TEXT, words, ids),
        attention_mask=one.attention_mask.repeat(3, 1),
        token_classes=one.token_classes.repeat(3, 1),
        images=one.images * 3,
        image_counts=(2, 2, 2),
    )
    counts: list[int] = []

    def merged(views: Any, *rest: Any) -> Any:
        found = merge(views, *rest)
        counts.append(len(found))
        return found

    merge = attention._merge
    monkeypatch.setattr(attention, "_merge", merged)
    trio.check_forward(POLICIES[name], batch)
    is_plain = trio.prepared._fastskip.decoder.ops.fused is None
    assert set(counts) == ({1} if is_plain else set())
    trio.check_greedy(POLICIES[name], batch)


@pytest.mark.parametrize("name", POLICIES)
def test_hidden_states_are_the_residual_stream(trio: Trio, batch: Batch, name: str) -> None:
    policy, inputs = POLICIES[name], batch.inputs()
    streams = []
    for plain in (trio.plain, trio.exact):
        with MaskedOracle(plain, policy) as oracle, torch.no_grad():
            oracle.forward(**inputs)
            *stream, last = oracle.stream
            streams.append([*stream, text_model_of(plain).norm(last)])
    with torch.no_grad():
        outputs = trio.under(policy)(**inputs, output_hidden_states=True, logits_to_keep=1)
    assert len(outputs.hidden_states) == 5
    for layer, states in enumerate(zip(outputs.hidden_states[1:], *streams, strict=True)):
        assert_within_budget(f"layer {layer}", *states, rows=batch.real)
    assert outputs.logits.shape[1] == 1


@pytest.mark.parametrize("asked", [2, [0, 2], [1, -1], [9, -9]])
def test_hidden_states_of_some_layers(trio: Trio, asked: int | list[int]) -> None:
    # Of text alone: with images Hugging Face asks its tower for the same layers.
    model, inputs = trio.under(CLASSES_DIFFER), {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True).hidden_states
        found = model(**inputs, output_hidden_states=asked).hidden_states
    indices = [asked] if isinstance(asked, int) else asked
    chosen = [index % 5 for index in indices if -5 <= index < 5]
    assert [states is not None for states in found] == [index in chosen for index in range(5)]
    for index in chosen:
        assert torch.equal(found[index], whole[index])


@pytest.mark.parametrize("name", POLICIES)
def test_loss_and_logits_of_an_answer(trio: Trio, batch: Batch, name: str) -> None:
    labels, classes = answer_labels(batch)
    both = trio.expected(POLICIES[name], token_classes=classes, **batch.inputs())
    plain_loss = trio.plain.loss_function(both[0], labels, both[0].shape[-1])
    # Hugging Face computes losses in fp32, so the truth is not its.
    exact_loss = torch.nn.functional.cross_entropy(both[1][:, :-1].mT, labels[:, 1:])
    with torch.no_grad():
        outputs = trio.under(POLICIES[name])(**batch.inputs(), labels=labels)
    assert_within_budget("loss", outputs.loss, plain_loss, exact_loss)
    assert_within_budget("logits", outputs.logits, *both, rows=batch.real)


def test_given_classes_win(trio: Trio, batch: Batch) -> None:
    classes = torch.randint(0, 3, batch.input_ids.shape)
    labels, _ = answer_labels(batch)
    options = {"classes": classes, "token_classes": classes}
    trio.check_forward(CLASSES_DIFFER, batch, **options)
    trio.check_forward(CLASSES_DIFFER, batch, labels=labels, **options)
    names = [[("image", "text", "generated")[code] for code in row] for row in classes.tolist()]
    trio.check_forward(CLASSES_DIFFER, batch, classes=classes, token_classes=names)


def embeddings(trio: Trio, batch: Batch) -> dict[str, torch.Tensor]:
    with MaskedOracle(trio.plain, policy_of()) as oracle, torch.no_grad():
        oracle.forward(**batch.inputs())
        assert oracle._seen["inputs_embeds"] is not None
        return {
            "inputs_embeds": oracle._seen["inputs_embeds"],
            "attention_mask": batch.attention_mask,
        }


def test_embeddings_need_classes_where_image_and_text_differ(trio: Trio, batch: Batch) -> None:
    model, inputs = trio.under(CLASSES_DIFFER), embeddings(trio, batch)
    for part in (model, model.model, text_model_of(model)):
        with pytest.raises(TypeError, match="token_classes"), torch.no_grad():
            part(**inputs)
    with pytest.raises(TypeError, match="token_classes"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    eager, truth = trio.expected(CLASSES_DIFFER, **batch.inputs())
    with torch.no_grad():
        logits = model(**inputs, token_classes=batch.token_classes).logits
    assert_within_budget("logits", logits, eager, truth, rows=batch.real)


def test_embeddings_alone_do_where_image_and_text_are_alike(trio: Trio, batch: Batch) -> None:
    policy = policy_of(
        skip([1], ["image", "text"], "attention", kv="omit"), skip([2], ["generated"], "ffn")
    )
    model, inputs = trio.under(policy), embeddings(trio, batch)
    labels, classes = answer_labels(batch)
    for options, given in (({}, batch.token_classes), ({"labels": labels}, classes)):
        eager, truth = trio.expected(policy, token_classes=given, **batch.inputs())
        with torch.no_grad():
            logits = model(**inputs, **options).logits
        assert_within_budget("logits", logits, eager, truth, rows=batch.real)
    with MaskedOracle(trio.plain, policy) as oracle:
        tokens = oracle.greedy(**batch.inputs(), max_new_tokens=3).tokens
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)


@pytest.mark.parametrize("name", POLICIES)
def test_inner_models_run_every_row(trio: Trio, batch: Batch, name: str) -> None:
    model = trio.under(POLICIES[name])
    eager, truth = trio.expected(POLICIES[name], **batch.inputs())
    with torch.no_grad():
        hidden = model.model(**batch.inputs()).last_hidden_state
        assert_within_budget("logits", model.lm_head(hidden), eager, truth, rows=batch.real)
        given = embeddings(trio, batch)
        inner = text_model_of(model)(**given, token_classes=batch.token_classes)
    assert torch.equal(inner.last_hidden_state[batch.real], hidden[batch.real])


def test_text_model_with_ids_runs_text_rows(trio: Trio) -> None:
    batch = random_batch(trio.plain, seed=3, images=(0, 0))
    model = trio.under(CLASSES_DIFFER)
    eager, truth = trio.expected(CLASSES_DIFFER, **batch.inputs())
    with torch.no_grad():
        hidden = text_model_of(model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        assert_within_budget("logits", model.lm_head(hidden), eager, truth, rows=batch.real)


FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {},
    "llava, biases": {"kind": "llava", "attention_bias": True, "mlp_bias": True},
    "llava, multi-head, tied": {"kind": "llava", "kv_heads": 4, "tied": True},
    "llava, multi-query, wide heads": {"kind": "llava", "kv_heads": 1, "head_dim": 16},
    "llava_next_vicuna": {},
    "llava_next_mistral": {},
    "llava_onevision": {},
    "llava_opt": {},
    "llama": {},
    "llama, biases, tied": {"attention_bias": True, "mlp_bias": True, "tied": True},
    "opt": {},
    "opt, tied, no biases": {"tied": True, "enable_bias": False},
    "opt, another activation": {"activation_function": "gelu"},
}
# Other activations are for the plain runtime.
CASES = [
    pytest.param(name, marks=[pytest.mark.reference] if "activation" in name else [])
    for name in FAMILIES
]
TEXT_ONLY: dict[str, Any] = {"llama": tiny_llama, "opt": tiny_opt}


def is_text_only(name: str) -> bool:
    return name.partition(",")[0] in TEXT_ONLY


def family(name: str) -> tuple[Trio, Batch]:
    options = dict(FAMILIES[name])
    if is_text_only(name):
        model, images = TEXT_ONLY[name.partition(",")[0]](**options), (0, 0, 0)
    else:
        kind: Kind = options.pop("kind", name)
        model, images = tiny_llava(kind, **options), (2, 0, 1)
    return Trio(model), random_batch(model, seed=4, images=images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_family(name: str, dtype: torch.dtype) -> None:
    trio, batch = family(name)
    if dtype is not torch.float32:
        trio = Trio(trio.plain.to(dtype))
    classes = ["text"] if is_text_only(name) else ["image"]
    policies = (
        policy_of(),
        policy_of(
            skip("1:3", classes, "block", kv="reuse"),
            skip([0, 3], ["generated"], "attention", kv="omit"),
            arrangements=(parallel([1]), parallel([0], "shared")),
        ),
        policy_of(skip([0], "all", "attention"), arrangements=(pair([[2, 3]]),)),
    )
    for policy in policies:
        trio.check_forward(policy, batch)
        labels, answers = answer_labels(batch)
        trio.check_forward(policy, batch, classes=answers, labels=labels)
        if dtype is torch.float32:
            trio.check_greedy(policy, batch)


@pytest.mark.parametrize("name", CASES)
def test_without_a_policy_it_is_the_plain_model(name: str) -> None:
    trio, batch = family(name)
    inputs = batch.inputs() | {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(trio.prepared.generate(**inputs), trio.plain.generate(**inputs))


def test_a_placeholder_that_was_generated_is_no_image() -> None:
    model = tiny_llava()
    image_id = model.config.image_token_id
    batch = random_batch(model, seed=1, images=(1, 0))
    policy = policy_of(skip("1:3", ["image"], "block", kv="omit"))
    first = int(model.generate(**batch.inputs(), max_new_tokens=1, do_sample=False)[0, -1])
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[image_id] = 3 * head[first]
    prepared = fastskip.apply_(copy.deepcopy(model), policy)
    with MaskedOracle(model, policy) as oracle:
        tokens = oracle.greedy(**batch.inputs(), max_new_tokens=4).tokens
    assert (tokens == image_id).any()
    out = prepared.generate(**batch.inputs(), max_new_tokens=4, do_sample=False)
    assert torch.equal(out[:, batch.columns :], tokens)


def test_an_image_class_on_a_text_only_model_is_refused() -> None:
    trio = Trio(tiny_llama())
    batch = random_batch(trio.plain, images=(0,))
    with pytest.raises(ValueError, match="token_classes"), torch.no_grad():
        trio.prepared(**batch.inputs(), token_classes=torch.zeros_like(batch.input_ids))


def test_bad_inputs_raise(trio: Trio, batch: Batch) -> None:
    model, inputs = trio.under(CLASSES_DIFFER), batch.inputs()
    for field, value in (
        ("token_classes", torch.full_like(batch.input_ids, 3)),
        ("token_classes", batch.token_classes[:, 1:]),
        ("token_classes", [["picture"] * batch.columns] * batch.size),
        ("attention_mask", batch.attention_mask[:, 1:]),
        ("position_ids", torch.zeros(1, 2, dtype=torch.long)),
        ("position_ids", torch.arange(batch.columns)[None] - batch.columns),
    ):
        with pytest.raises(ValueError, match=field):
            model(**inputs | {field: value})


def test_given_classes_of_a_prompt(trio: Trio, batch: Batch) -> None:
    """In `generate` they describe the prompt; what comes after it is GENERATED all the same."""
    classes = torch.randint(0, 3, batch.input_ids.shape)
    with MaskedOracle(trio.plain, CLASSES_DIFFER) as oracle:
        tokens = oracle.greedy(**batch.inputs(), token_classes=classes, max_new_tokens=4).tokens
    model = trio.under(CLASSES_DIFFER)
    options = {"max_new_tokens": 4, "do_sample": False, "token_classes": classes}
    for use_cache in (True, False):
        out = model.generate(**batch.inputs(), **options, use_cache=use_cache)
        assert torch.equal(out[:, batch.columns :], tokens)
    out = model.generate(**embeddings(trio, batch), **options)
    assert torch.equal(out, tokens)
