"""The oracle on whole models: the untouched model, batches, decoding, and leaving no trace."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastskip.verification.cells import GENERATED, IMAGE, TEXT, classify
from fastskip.verification.oracle import MaskedOracle
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget, truth_copy
from tests.models import LLAVA_KINDS, tiny_llama, tiny_llava, tiny_opt

MODELS = (*LLAVA_KINDS, "llama", "opt")
POLICY = {
    "rules": [
        {"layers": "1:3", "tokens": ["image"], "skip": ["block"], "kv": "reuse"},
        {"layers": [2], "tokens": ["text"], "skip": ["attention"], "kv": "omit"},
        {"layers": [3], "tokens": ["generated"], "skip": ["ffn"]},
    ],
    "arrangements": [{"layers": [3], "kind": "parallel", "norm": "own"}],
}


def build(name: str) -> PreTrainedModel:
    match name:
        case "llama":
            return tiny_llama()
        case "opt":
            return tiny_opt()
    return tiny_llava(name)  # type: ignore[arg-type]


def build_batch(model: PreTrainedModel, name: str, seed: int = 1, **options: Any) -> Batch:
    images = (0, 0, 0) if name in ("llama", "opt") else (2, 0, 1)
    return random_batch(model, seed, images=images, **options)


def oracle_logits(model: PreTrainedModel, policy: dict[str, Any], batch: Batch) -> torch.Tensor:
    with MaskedOracle(model, policy) as oracle, torch.no_grad():
        return oracle.forward(**batch.inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_empty_policy_is_the_untouched_model(name: str, padding: Any, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    batch = build_batch(model, name, padding=padding, extra_columns=1)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(**batch.inputs(), position_ids=positions).logits
    masked = oracle_logits(model, {}, batch)
    assert masked.isfinite().all()
    truth = oracle_logits(truth_copy(model), {}, batch)
    assert_within_budget("logits", masked, plain, truth, rows=batch.real)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model = build(name)
    batch = build_batch(model, name)
    tokens = model.generate(**batch.inputs(), max_new_tokens=6, do_sample=False)
    with MaskedOracle(model, {}) as oracle:
        assert torch.equal(
            oracle.greedy(**batch.inputs(), max_new_tokens=6).tokens, tokens[:, batch.columns :]
        )


def test_greedy_ends_as_generate_does() -> None:
    model = tiny_llava()
    batch = random_batch(model, images=(1, 0, 1))
    free = model.generate(**batch.inputs(), max_new_tokens=6, do_sample=False)[:, batch.columns :]
    ends = [int(free[0, 1]), int(free[1, 3]), int(free[2, 2])]
    tokens = model.generate(
        **batch.inputs(), max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=7
    )
    with MaskedOracle(model, {}) as oracle:
        ended = oracle.greedy(
            **batch.inputs(), max_new_tokens=6, eos_token_id=ends, pad_token_id=7
        ).tokens
    assert torch.equal(ended, tokens[:, batch.columns :])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "llava_next_vicuna", "llava_onevision"])
def test_batch_is_its_sequences_alone(name: str, padding: Any) -> None:
    model = truth_copy(build(name))
    batch = build_batch(model, name, padding=padding, extra_columns=2)
    with MaskedOracle(model, POLICY) as oracle:
        together = oracle.forward(**batch.inputs())
        decoded = oracle.greedy(**batch.inputs(), max_new_tokens=4)
        for i in range(batch.size):
            alone = batch.alone(i).inputs()
            torch.testing.assert_close(together[i, batch.real[i]], oracle.forward(**alone)[0])
            single = oracle.greedy(**alone, max_new_tokens=4)
            assert torch.equal(decoded.tokens[i], single.tokens[0])
            torch.testing.assert_close(decoded.scores[i], single.scores[0])


def test_greedy_scores_are_the_logits_of_the_whole_sequence() -> None:
    """Decoding step by step is one run over prompt and answer, classes included."""
    model = truth_copy(tiny_llava())
    batch = random_batch(model, images=(2, 1))
    with MaskedOracle(model, POLICY) as oracle:
        tokens, scores = oracle.greedy(**batch.inputs(), max_new_tokens=3)
        prompt = oracle.prompt(**batch.inputs())
        given = oracle.continuation(prompt, tokens[:, :2])
        whole = batch.inputs()
        whole["input_ids"] = torch.cat([batch.input_ids, tokens[:, :2]], dim=1)
        whole["attention_mask"] = torch.cat([batch.attention_mask, torch.ones(2, 2)], dim=1)
        new = torch.full((2, 2), GENERATED)
        classes = torch.cat([batch.token_classes, new], dim=1)
        logits = oracle.forward(**whole, token_classes=classes)
    torch.testing.assert_close(given, scores)
    torch.testing.assert_close(logits[:, -3:], scores)


def test_generated_token_with_the_image_id_is_generated() -> None:
    model = truth_copy(tiny_llava())
    batch = random_batch(model)
    image_id = model.config.image_token_id
    with MaskedOracle(model, {}) as oracle:
        prompt = oracle.prompt(**batch.inputs())
        after_image_id = oracle.continuation(prompt, torch.full((2, 1), image_id))[:, -1]
        after_other = oracle.continuation(prompt, torch.full((2, 1), 5))[:, -1]
    assert (after_image_id - after_other).abs().max() > 1e-2


@pytest.mark.parametrize("sublayer", ["attention", "ffn", "block"])
@pytest.mark.parametrize("kind", LLAVA_KINDS)
def test_classes_come_from_the_prompt(kind: Any, sublayer: str) -> None:
    """A rule for images changes image rows and later ones; one for new tokens spares the prompt."""
    model = tiny_llava(kind)
    batch = random_batch(model, images=(1, 2))
    dense = oracle_logits(model, {}, batch)

    def rule(token_class: str) -> dict[str, Any]:
        return {"rules": [{"layers": ":-1", "tokens": [token_class], "skip": [sublayer]}]}

    assert (oracle_logits(model, rule("image"), batch) - dense)[batch.real].abs().max() > 1e-2
    assert (oracle_logits(model, rule("text"), batch) - dense)[batch.real].abs().max() > 1e-2
    assert torch.equal(oracle_logits(model, rule("generated"), batch), dense)
    with MaskedOracle(model, {}) as oracle:
        plain = oracle.greedy(**batch.inputs(), max_new_tokens=2).scores
    with MaskedOracle(model, rule("generated")) as oracle:
        skipped = oracle.greedy(**batch.inputs(), max_new_tokens=2).scores
    assert torch.equal(plain[:, 0], skipped[:, 0])
    assert (plain[:, 1] - skipped[:, 1]).abs().max() > 1e-2


def test_leaves_no_trace_even_after_an_error() -> None:
    model = tiny_llava()
    batch = random_batch(model)

    def traces() -> list[Any]:
        hooks = [
            len(found)
            for module in model.get_decoder().modules()
            for found in (module._forward_hooks, module._forward_pre_hooks)
        ]
        return [hooks, sorted(ALL_ATTENTION_FUNCTIONS), model.config.to_dict(), model.training]

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before, plain = traces(), model(**batch.inputs()).logits
    with pytest.raises(ZeroDivisionError), MaskedOracle(model, POLICY) as oracle:
        oracle.forward(**batch.inputs())
        assert model.config.get_text_config()._attn_implementation.startswith("fastskip_oracle")
        raise ZeroDivisionError
    assert traces() == before
    assert torch.equal(model(**batch.inputs()).logits, plain)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    with MaskedOracle(model, POLICY) as first:
        kept = first.forward(**batch.inputs())
    with first:
        assert torch.equal(first.forward(**batch.inputs()), kept)


def test_stream_holds_every_layer() -> None:
    model = tiny_llava(depth=3)
    batch = random_batch(model)
    with torch.no_grad():
        states = model(**batch.inputs(), output_hidden_states=True).hidden_states
    with MaskedOracle(model, {}) as oracle:
        oracle.forward(**batch.inputs())
    for mine, plain in zip(oracle.stream[:-1], states[1:-1], strict=True):
        torch.testing.assert_close(mine[batch.real], plain[batch.real])


def test_gradients_flow() -> None:
    model = tiny_llava()
    batch = random_batch(model)
    with MaskedOracle(model, POLICY) as oracle:
        oracle.forward(**batch.inputs())[batch.real].square().mean().backward()
    gradients = [p.grad for p in model.get_decoder().parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_refuses_what_it_cannot_do() -> None:
    model = tiny_llava("llava_next_mistral")
    batch = random_batch(model)
    oracle = MaskedOracle(model, {})
    with pytest.raises(RuntimeError, match="enter the oracle"):
        oracle.forward(**batch.inputs())
    with oracle:
        with pytest.raises(RuntimeError, match="already been entered"):
            oracle.__enter__()
        with pytest.raises(TypeError, match="token_classes"):
            oracle.forward(inputs_embeds=torch.zeros(1, 2, 32))
        oracle.forward(**batch.inputs())
        with pytest.raises(RuntimeError, match="call the oracle, not the model"):
            model(**batch.inputs())
        model.config.text_config.sliding_window = 4
        with pytest.raises(ValueError, match="sliding_window: 4"):
            oracle.forward(**batch.inputs())
    with pytest.raises(ValueError, match="decisions: needed"):
        MaskedOracle(model, {"routers": [{}]})
    with pytest.raises(ValueError, match="training mode"), MaskedOracle(model.train(), {}):
        pass


def test_classes() -> None:
    config = tiny_llava("llava_onevision").config
    image, video = config.image_token_id, config.video_token_id
    ids = torch.tensor([[4, image, video, 5, 6]])
    labels = torch.tensor([[-100, 8, -100, 5, -100]])

    def classes(**options: Any) -> list[int]:
        return classify(ids, config, **options)[0].tolist()  # type: ignore[no-any-return]

    assert classes() == [TEXT, IMAGE, IMAGE, TEXT, TEXT]
    assert classes(labels=labels) == [TEXT, IMAGE, IMAGE, GENERATED, TEXT]
    assert classes(prompt_length=2) == [TEXT, IMAGE] + [GENERATED] * 3
    assert classes(image_features=False) == [TEXT] * 5
