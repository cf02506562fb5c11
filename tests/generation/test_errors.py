"""Bad input to `generate` and to the verbs raises a typed error that names the field."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from tests.batches import Batch, random_batch
from tests.checkpoints import VOCAB
from tests.models import tiny_llama, tiny_llava

IMAGES_DIFFER = {
    "schema_version": 1,
    "rules": [{"layers": [1], "tokens": ["image"], "skip": ["ffn"]}],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return fastskip.apply_(tiny_llava(vocab=VOCAB), IMAGES_DIFFER)


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return random_batch(model, images=(1, 0))


def options(name: str, model: Any, batch: Batch) -> dict[str, Any]:
    """What is wrong with a call, by the field that its error must name."""
    embedded = model.get_input_embeddings()(batch.input_ids)
    wrong: dict[str, dict[str, Any]] = {
        "attention_mask": {"attention_mask": batch.attention_mask[:, 2:]},
        "attention_mask of other sequences": {"attention_mask": batch.attention_mask[:1]},
        "attention_mask with four dimensions": {
            "attention_mask": batch.attention_mask[:, None, None]
        },
        "token_classes": {"token_classes": torch.full_like(batch.input_ids, 7)},
        "token_classes of other sequences": {"token_classes": batch.token_classes[:1]},
        "token_classes by a wrong name": {"token_classes": [["picture"] * batch.columns] * 2},
        "token_classes missing": {
            "input_ids": None,
            "pixel_values": None,
            "inputs_embeds": embedded,
        },
        f"{CACHE_NAME}: Hugging Face's": {CACHE_NAME: DynamicCache()},
        "cache_implementation": {"cache_implementation": "static"},
        "max_new_tokenz": {"max_new_tokenz": 3},
    }
    return wrong[name]


CASES = {
    "attention_mask": ValueError,
    "attention_mask of other sequences": ValueError,
    "attention_mask with four dimensions": ValueError,
    "token_classes": ValueError,
    "token_classes of other sequences": ValueError,
    "token_classes by a wrong name": ValueError,
    "token_classes missing": TypeError,
    f"{CACHE_NAME}: Hugging Face's": TypeError,
    "cache_implementation": ValueError,
    "max_new_tokenz": ValueError,
}


@pytest.mark.parametrize(("name", "error"), CASES.items(), ids=CASES.keys())
def test_generate(model: Any, batch: Batch, name: str, error: type[Exception]) -> None:
    inputs = {**batch.inputs(), "max_new_tokens": 2, **options(name, model, batch)}
    given = {key: value for key, value in inputs.items() if value is not None}
    with pytest.raises(error, match=name.split()[0]):
        model.generate(**given)
    # The model is as usable as before.
    assert model.generate(**batch.inputs(), max_new_tokens=2).shape == (2, batch.columns + 2)


def test_second_turn_that_hides_what_the_cache_holds(model: Any, batch: Batch) -> None:
    first = model.generate(**batch.inputs(), max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat((batch.attention_mask, torch.ones(2, 4, dtype=torch.long)), dim=1)
    mask[0, batch.columns - 1] = 0
    ids = torch.cat((first.sequences, torch.tensor([[5], [6]])), dim=1)
    with pytest.raises(ValueError, match="attention_mask: changes which cached columns"):
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{CACHE_NAME: first[CACHE_NAME]},
            max_new_tokens=2,
        )


def test_second_turn_after_another_policy(model: Any, batch: Batch) -> None:
    model = copy.deepcopy(model)
    first = model.generate(**batch.inputs(), max_new_tokens=3, return_dict_in_generate=True)
    fastskip.set_policy(model, "dense")
    mask = torch.ones(2, batch.columns + 3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{CACHE_NAME}: .*another policy"):
        model.generate(
            input_ids=first.sequences, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]}
        )


def test_a_stock_model_refuses_our_cache(model: Any, batch: Batch) -> None:
    out = model.generate(**batch.inputs(), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(TypeError, match="past_key_values"):
        tiny_llava(vocab=VOCAB)(input_ids=torch.tensor([[5], [6]]), **{CACHE_NAME: out[CACHE_NAME]})


@pytest.mark.parametrize("verb", ["set_policy", "plan_of"])
def test_verbs_need_a_prepared_model(verb: str) -> None:
    arguments: tuple[Any, ...] = ({},) if verb == "set_policy" else ()
    with pytest.raises(TypeError, match="LlamaForCausalLM is not prepared.*apply_"):
        getattr(fastskip, verb)(tiny_llama(), *arguments)


@pytest.mark.parametrize("name", ["layers.1", "layers.1.self_attn"])
def test_hooks_that_would_never_be_called(model: Any, batch: Batch, name: str) -> None:
    decoder = model.model.language_model
    handle = decoder.get_submodule(name).register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match=r"layers\[1\].*output_hidden_states"):
            model(**batch.inputs())
    finally:
        handle.remove()
    model(**batch.inputs())


def test_image_rules_on_a_text_only_model() -> None:
    with pytest.raises(fastskip.PolicyError, match="image"):
        fastskip.apply_(tiny_llama(), IMAGES_DIFFER)


def test_routers_that_the_device_executor_lacks() -> None:
    router = {"layers": [1], "tokens": ["text"], "skip": ["block"]}
    copies = {"layers": [2], "tokens": ["text"], "skip": ["attention"], "kv": "reuse"}
    holes = router | {"kind": "random", "rate": 0.5, "kv": "omit"}
    own = router | {"kind": "acme.own"}

    class Own:
        def decide(self, context: fastskip.RoutingContext) -> fastskip.Decision:
            raise AssertionError("is not called")

    given: dict[str, Any] = {"acme.own": Own()}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"routers": [own]}, {"routers": given}, "acme.own.*supported: similarity"),
        ({"routers": [holes], "rules": [copies]}, {}, "kv reuse in layer 2 from layer 1"),
    ]
    for policy, options, message in cases:
        policy["schema_version"] = 1
        with pytest.raises(fastskip.UnsupportedModelError, match=f"impl='reference'.*{message}"):
            fastskip.apply_(tiny_llama(), policy, impl="torch", **options)
        prepared = fastskip.apply_(tiny_llama(), impl="torch")
        with pytest.raises(fastskip.UnsupportedModelError, match=f"impl='reference'.*{message}"):
            fastskip.set_policy(prepared, policy, **options)
        fastskip.apply_(tiny_llama(), policy, impl="reference", **options)


def test_error_types() -> None:
    assert issubclass(fastskip.PolicyError, ValueError)
    assert issubclass(fastskip.UnsupportedModelError, ValueError)
