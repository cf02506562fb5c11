"""What users do to a model besides calling it, and what they hand it: as in Hugging Face, or said.

Each is compared with the untouched model on the same weights.
"""

import copy
import functools
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastskip
from fastskip import UnsupportedModelError
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.saving import POLICY_FILE
from tests.batches import random_batch
from tests.models import tiny_llama, tiny_llava, tiny_opt
from tests.policies import policy_of, skip

IMPLS = ["reference", "torch"]
IDS = torch.tensor([[5, 6, 7, 8, 9]])
IMAGE_RULE = policy_of(skip("1:3", ["image"], "ffn"))
Edit = Callable[[Any], Any]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pair(impl: str) -> tuple[Any, Any]:
    """The untouched model and the prepared one, which users may spoil."""
    return tiny_llama(), fastskip.apply_(tiny_llama(), impl=impl)


def check_followed(pair: tuple[Any, Any], edit: Edit) -> None:
    """What users do to both models changes the answer, and equally."""
    before = told(pair[0])
    for model in pair:
        told(model)
        edit(model)
    answers = [told(model) for model in pair]
    assert answers[0] == answers[1] != before


def told(model: Any, new: int = 6, **options: Any) -> list[int]:
    """New tokens of a greedy answer."""
    out: Tensor = model.generate(IDS, max_new_tokens=new, do_sample=False, **options)
    return out[0, IDS.shape[1] :].tolist()


# Calling the model does more than its class does.


def steer(module: Any, inputs: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * torch.linspace(-1, 1, 32)
    return output


def favour(model: Any, inputs: Any, output: Any) -> Any:
    output.logits = output.logits + 40 * (torch.arange(64) % 7 == 3)
    return output


def hook_inside(model: Any) -> None:
    model.model.register_forward_hook(steer)


def hook_outside(model: Any) -> None:
    model.register_forward_hook(favour)


def replace_forward(model: Any) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def other(*arguments: Any, **options: Any) -> Any:
        return favour(model, None, forward(*arguments, **options))

    model.forward = other


@pytest.mark.parametrize("edit", [hook_inside, hook_outside, replace_forward])
def test_steps_call_what_users_put_around_the_model(pair: tuple[Any, Any], edit: Edit) -> None:
    check_followed(pair, edit)


def test_steps_call_the_forward_of_a_users_own_class(impl: str) -> None:
    class Favouring(transformers.LlamaForCausalLM):
        @functools.wraps(transformers.LlamaForCausalLM.forward)
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return favour(self, None, super().forward(*arguments, **options))

    models: list[Any] = [tiny_llama(), tiny_llama()]
    for model in models:
        model.__class__ = Favouring
    fastskip.apply_(models[1], impl=impl)
    assert told(models[1]) == told(models[0]) != told(tiny_llama())


def wrap(model: Any) -> None:
    """As accelerate does."""
    model.forward = functools.wraps(model.forward)(functools.partial(model.forward))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_llava])
def test_a_forward_that_was_wrapped_before(
    impl: str, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    policy = policy_of(skip([2, 3], ["generated"], "ffn"))
    plain = fastskip.apply_(make(), policy, impl=impl)
    model = make()
    wrap(model)
    fastskip.apply_(model, policy, impl=impl)
    assert told(model, **options) == told(plain, **options) != told(make(), **options)


def test_steps_are_told_what_the_prompt_was_told(impl: str) -> None:
    class Favouring(transformers.LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self, input_ids: Any = None, strength: float | None = None, **kwargs: Any
        ) -> Any:
            assert kwargs["attention_mask"].shape[1] >= IDS.shape[1]
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + (strength or 0) * (torch.arange(64) % 7 == 3)
            return output

    models: list[Any] = [tiny_llama(), tiny_llama()]
    for model in models:
        model.__class__ = Favouring
    fastskip.apply_(models[1], impl=impl)
    mask: dict[str, Any] = {"attention_mask": torch.ones_like(IDS)}
    answers = [told(model, strength=40.0, **mask) for model in models]
    assert answers[0] == answers[1] != told(models[0], **mask)


def test_hooks_on_a_model_around_the_decoder() -> None:
    pair = tiny_llava("llava_opt"), fastskip.apply_(tiny_llava("llava_opt"))
    check_followed(pair, lambda model: model.model.language_model.register_forward_hook(steer))


# Weights and numbers are changed after preparing.


def replace_layer(model: Any) -> None:
    model.model.layers[1] = tiny_llama(seed=4).model.layers[1]


def turn_slower(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.3)


def replace_rotary(model: Any) -> None:
    other = copy.deepcopy(model.model.rotary_emb)
    other.inv_freq = other.inv_freq * 0.3
    model.model.rotary_emb = other


def change_epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.01


@pytest.mark.parametrize(
    "edit", [replace_layer, turn_slower, replace_rotary, change_epsilon, change_scaling]
)
def test_changes_to_layers_are_followed(pair: tuple[Any, Any], edit: Edit) -> None:
    check_followed(pair, edit)


def test_layers_that_are_gone_are_missed(pair: tuple[Any, Any]) -> None:
    del pair[1].model.layers[2]
    with pytest.raises(RuntimeError, match="layers: 3; allowed: 4"):
        told(pair[1])


def test_fewer_layers_by_config(pair: tuple[Any, Any], impl: str) -> None:
    stock = tiny_llama()
    stock.config.num_hidden_layers = 2
    model = fastskip.apply_(copy.deepcopy(stock), impl=impl)
    assert told(model) == told(stock) != told(pair[0])


def test_another_language_model_is_refused(impl: str) -> None:
    model = fastskip.apply_(tiny_llava(), impl=impl)
    model.model.language_model = tiny_llama().model
    with pytest.raises(RuntimeError, match="language model: replaced.*apply_"):
        model(input_ids=IDS)


def test_weights_merged_in_inference_mode_can_be_trained(impl: str) -> None:
    model: Any = tiny_llama()
    with torch.inference_mode():
        fastskip.apply_(model, impl=impl)
    model(IDS, labels=IDS).loss.backward()
    model.double().float()
    with torch.inference_mode():
        told(model)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_a_single_row_can_be_trained_after_inference_mode(pair: tuple[Any, Any]) -> None:
    for model in pair:
        with torch.inference_mode():
            told(model)
        model(IDS[:, :1]).logits.sum().backward()
    grads = [each.model.layers[0].self_attn.v_proj.weight.grad for each in pair]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("picked", [[0, 1], [1, 0, 1]])
def test_caches_filled_in_inference_mode_go_on_outside(
    pair: tuple[Any, Any], picked: list[int]
) -> None:
    batch, answers = random_batch(pair[0], 2, images=(0, 0), text=(3, 9)), []
    mask = torch.cat((batch.attention_mask, torch.ones(2, 6, dtype=torch.long)), 1)[picked]
    for model in pair:
        with torch.inference_mode():
            first = model.generate(**batch.inputs(), max_new_tokens=4, return_dict_in_generate=True)
            cache = first[CACHE_NAME]
            cache.batch_select_indices(torch.tensor(picked))
        ids = torch.cat((first.sequences, torch.full((2, 2), 7)), 1)[picked]
        again = {"attention_mask": mask, CACHE_NAME: cache, "max_new_tokens": 4}
        answers.append(model.generate(ids, **again))
    assert torch.equal(*answers)


def test_plans_are_of_the_model_as_it_is(impl: str) -> None:
    model = fastskip.apply_(tiny_llama(), impl=impl)
    model.resize_token_embeddings(100)
    assert fastskip.plan_of(model.to(torch.bfloat16)).shape.vocab_size == 100
    assert fastskip.plan_of(model).shape.dtype_bytes == 2


# Where and how it runs.


def test_another_default_device(pair: tuple[Any, Any]) -> None:
    """``meta`` stands for any: what lands on it has no numbers."""
    with torch.device("meta"):
        answers = [told(model) for model in pair]
        with torch.no_grad():
            logits = [model(IDS).logits for model in pair]
    assert answers[0] == answers[1]
    torch.testing.assert_close(logits[1], logits[0])


def test_autocast(pair: tuple[Any, Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = [told(model) for model in pair]
        with torch.no_grad():
            logits = [model(IDS).logits.float() for model in pair]
    assert len(answers[1]) == len(answers[0])  # which tokens are best may be a matter of rounding
    exact = pair[0](IDS).logits
    rounding = (logits[0] - exact).abs().max()
    assert (logits[1] - exact).abs().max() <= 2 * rounding


def test_a_model_goes_with_its_last_user(impl: str) -> None:
    model = fastskip.apply_(tiny_llava(), impl=impl)
    inputs = random_batch(model, images=(1,)).inputs()
    model.generate(**inputs, max_new_tokens=2)
    inner = copy.deepcopy(model).model.language_model
    del inputs
    gc.collect()
    weights = weakref.ref(model.model.language_model.layers[0].mlp.down_proj.weight)
    gc.disable()
    try:
        del model
        assert weights() is None
    finally:
        gc.enable()
    with torch.no_grad():  # a part of a copy runs without the rest of it
        assert inner(input_ids=IDS).last_hidden_state.isfinite().all()


# What they ask for that is not there.


def test_packed_sequences_are_refused(impl: str) -> None:
    for make in (tiny_llama, tiny_llava, tiny_opt):
        model: Any = fastskip.apply_(make(), impl=impl)
        places = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        with torch.no_grad(), pytest.raises(ValueError, match="position_ids: several sequences"):
            model(input_ids=IDS, **places, use_cache=False)
        mask = torch.ones_like(IDS)  # says that it is one sequence
        model(input_ids=IDS, **places, attention_mask=mask, use_cache=False)


def test_rows_that_see_later_ones_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="is_causal: False"):
        pair[1](IDS, is_causal=False)
    pair[0].config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="is_causal: False"):
        fastskip.apply_(pair[0])


WHOLE: dict[str, Any] = {
    "fastv": "fastv",
    "exit": fastskip.SkipPolicy.preset("paper/exit", after=1),
    "capacity": {
        "schema_version": 1,
        "routers": [
            {"layers": [1], "tokens": ["text"], "skip": ["ffn"], "kind": "random", "rate": 0.5}
            | {"group": "sequence", "agree": "mean"}
        ],
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_prompts_in_pieces_are_not_whole_prompts(name: str) -> None:
    model = fastskip.apply_(tiny_llava(), WHOLE[name])
    inputs = random_batch(model, images=(1,)).inputs()
    with pytest.raises(ValueError, match="prefill_chunk_size: 3; allowed: None"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=3)


def test_prompts_in_pieces(pair: tuple[Any, Any]) -> None:
    assert told(pair[1], prefill_chunk_size=2) == told(pair[0], prefill_chunk_size=2)
    batch = random_batch(pair[0], 2, images=(0, 0), text=(3, 8), padding="right")
    with pytest.raises(ValueError, match="allowed: left padding"):
        pair[1].generate(**batch.inputs(), max_new_tokens=2, prefill_chunk_size=2)


PLACES = torch.tensor([[0, 1, 5, 6, 9]])


def test_positions_of_prompts_in_pieces(pair: tuple[Any, Any]) -> None:
    answers = [told(each, position_ids=PLACES, prefill_chunk_size=2) for each in pair]
    assert answers[1] == answers[0] == told(pair[0], position_ids=PLACES) != told(pair[0])


def test_positions_of_a_second_turn(pair: tuple[Any, Any]) -> None:
    answers = []
    for model in pair:
        with torch.no_grad():
            cache = model(IDS[:, :2], use_cache=True)[CACHE_NAME]
        answers.append(told(model, position_ids=PLACES, **{CACHE_NAME: cache}))
    assert answers[1] == answers[0] == told(pair[0], position_ids=PLACES)


@pytest.mark.parametrize("first", [0, 2, 3])
def test_prompts_that_a_cache_holds_already_are_refused(pair: tuple[Any, Any], first: int) -> None:
    """All of them, or fewer new columns than it has without the mask of all."""
    model = pair[1]
    cache = model(IDS, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="columns, but .* holds 5; needed: the whole"):
        model.generate(IDS[:, first:], max_new_tokens=2, **{CACHE_NAME: cache})
    more, mask = torch.tensor([[3, 4]]), torch.ones(1, 7)
    found = model.generate(more, attention_mask=mask, max_new_tokens=2, **{CACHE_NAME: cache})
    expected = pair[0].generate(torch.cat((IDS, more), 1), max_new_tokens=2)
    assert torch.equal(found[:, -2:], expected[:, -2:])


@pytest.mark.parametrize("keep", [0, 1, 2, torch.tensor([-1])], ids=["all", "1", "2", "tensor"])
def test_more_logits_of_prompts_that_are_padded_on_the_right(
    pair: tuple[Any, Any], keep: int | Tensor
) -> None:
    batch = random_batch(pair[0], 2, images=(0, 0), text=(3, 8), padding="right")
    alone = [pair[0].generate(**batch.alone(i).inputs(), max_new_tokens=4)[:, -4:] for i in (0, 1)]
    found = pair[1].generate(**batch.inputs(), max_new_tokens=4, logits_to_keep=keep)[:, -4:]
    assert torch.equal(found, torch.cat(alone))


def test_gradients_do_not_end_in_a_cache_unsaid(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    cache = model(IDS, use_cache=True)[CACHE_NAME]
    next_one = model(IDS[:, :1], **{CACHE_NAME: copy.deepcopy(cache)})  # by hand, without no_grad
    expected = pair[0](torch.cat((IDS, IDS[:, :1]), 1))
    torch.testing.assert_close(next_one.logits[:, -1], expected.logits[:, -1])
    with pytest.raises(ValueError, match="gradients do not flow through a cache"):
        model(IDS, labels=IDS, **{CACHE_NAME: cache})


def test_placeholders_without_pixels_are_text(impl: str) -> None:
    """In ``generate`` as in a forward."""
    stock, model = tiny_llava(), fastskip.apply_(tiny_llava(), IMAGE_RULE, impl=impl)
    image_id: int = stock.config.image_token_id
    ids = torch.tensor([[5, *[image_id] * 4, 9]])
    answers = [each.generate(ids, max_new_tokens=4) for each in (stock, model)]
    assert torch.equal(*answers)


def test_labels_of_the_last_columns(pair: tuple[Any, Any]) -> None:
    """Their rows are generated ones, as those of labels for all columns are."""
    policy = policy_of(skip([2, 3], ["generated"], "ffn"))
    model = fastskip.set_policy(copy.deepcopy(pair[1]), policy)
    labels = IDS.clone()
    labels[:, :-2] = -100
    whole = model(IDS, labels=labels).logits
    last = model(IDS, labels=labels[:, -2:], logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])
    assert (last - pair[0](IDS).logits[:, -2:]).abs().max() > 1e-2
    losses = [model(IDS, labels=IDS[:, -2:], logits_to_keep=2).loss for model in pair]
    torch.testing.assert_close(losses[1], losses[0])


def test_bad_numbers(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    with pytest.raises(ValueError, match="logits_to_keep: -2; allowed: 0"):
        model(IDS, logits_to_keep=-2)
    with pytest.raises(ValueError, match="input_ids: no columns"):
        model(IDS[:, :0])
    with pytest.raises(UnsupportedModelError, match="generate_batch: 'continuous batching'"):
        model.generate_batch([[5, 6, 7]])


def test_policies_stay_while_generate_runs(pair: tuple[Any, Any]) -> None:
    class Swapping(transformers.StoppingCriteria):
        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            fastskip.set_policy(pair[1], policy_of(skip("1:", "all", "ffn")))

    criteria = transformers.StoppingCriteriaList([Swapping()])
    with pytest.raises(RuntimeError, match="policy: set while generate runs"):
        told(pair[1], stopping_criteria=criteria)
    assert told(pair[1]) == told(pair[0])


@pytest.mark.parametrize("inner", ["model", "model.language_model"])
def test_inner_models_have_the_lens(inner: str) -> None:
    model = fastskip.apply_(tiny_llava(), "paper/entropy")
    part = model.get_submodule(inner)
    with torch.no_grad():
        assert part(input_ids=IDS).last_hidden_state.isfinite().all()
        del model
        if inner == "model.language_model":
            with pytest.raises(fastskip.RouterError, match="head: the model around it was freed"):
                part(input_ids=IDS)


# What they prepare.


def test_a_model_that_was_asked_for_hidden_states_before() -> None:
    model: Any = tiny_llava()
    inputs = random_batch(model, images=(1,)).inputs()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        found = fastskip.apply_(model)(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiling_leaves_the_runtime_alone(impl: str) -> None:
    """Rows are chosen at run time; a traced graph would keep those of its first call."""
    for model in tiny_llama(), tiny_llava():
        expected = told(model)
        fastskip.apply_(model, impl=impl).compile(backend="eager")
        assert told(model) == expected
        with torch.no_grad():
            first = model(IDS, use_cache=True)
            kept = {CACHE_NAME: first[CACHE_NAME]}
            again = model(first.logits[:, -1:].argmax(-1), **kept)
        assert [first.logits[0, -1].argmax(), again.logits[0, -1].argmax()] == expected[:2]


WRONG: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a name": lambda: "llava",
    "a module": lambda: nn.Linear(2, 2),
    "a wrapped model": lambda: nn.DataParallel(tiny_llava()),
    "a compiled model": lambda: torch.compile(tiny_llava()),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_model(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="model: '.*supported: a transformers model"):
        fastskip.apply_(WRONG[name]())


def test_a_text_model_of_the_users_own_is_refused() -> None:
    class Mine(transformers.LlamaModel):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return super().forward(*arguments, **options)

    model: Any = tiny_llama()
    model.model.__class__ = Mine
    with pytest.raises(UnsupportedModelError, match="text model: 'Mine'"):
        fastskip.apply_(model)


def test_parts_of_models_are_refused_and_left_alone() -> None:
    model: Any = tiny_llama()
    before = told(model)
    with pytest.raises(UnsupportedModelError, match="'LlamaModel'.*the whole LlamaForCausalLM"):
        fastskip.apply_(model.model)
    assert told(model) == before
    with pytest.raises(UnsupportedModelError, match="the whole LlavaForConditionalGeneration"):
        fastskip.apply_(tiny_llava().model)


# Saving.


def test_policies_are_uploaded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: set[str] = set()

    def upload(model: Any, folder: Any, repo: Any, stamps: dict[str, float], **_: Any) -> None:
        uploaded.update(set(os.listdir(folder)) - stamps.keys())

    base = transformers.PreTrainedModel
    monkeypatch.setattr(base, "_upload_modified_files", upload)
    monkeypatch.setattr(base, "_get_files_timestamps", lambda *_: {})
    hub = type("Hub", (), {"create_repo": lambda *_, **__: type("Repo", (), {"repo_id": "a/b"})()})
    monkeypatch.setattr("transformers.modeling_utils.create_repo", hub().create_repo, raising=False)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *_, **__: hub(), raising=False)
    card = type("Card", (), {"save": lambda *_: None})()
    name = "transformers.modeling_utils.create_and_tag_model_card"
    monkeypatch.setattr(name, lambda *_, **__: card)
    model = fastskip.apply_(tiny_llama(), policy_of(skip([1], "all", "ffn")))
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="a/b")
    assert {POLICY_FILE, "config.json"} <= uploaded


def test_one_process_writes_the_policy(tmp_path: Path) -> None:
    model = fastskip.apply_(tiny_llama(), policy_of(skip([1], "all", "ffn")))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / POLICY_FILE).exists()
