"""What surrounds the options of `generate`: turns, embeddings, streamers, assistants, pipelines."""

import copy
import threading
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from tests.batches import random_batch
from tests.checkpoints import IMAGE_ID, VOCAB, build_processor, build_tokenizer
from tests.generating import NEW, Twins, twins
from tests.models import tiny_llava

KEPT = {"return_dict_in_generate": True, "max_new_tokens": NEW}


@pytest.fixture(scope="module", params=["llava", "llama", "opt"])
def models(request: pytest.FixtureRequest) -> Twins:
    return twins(request.param)


@pytest.fixture(scope="module")
def llava() -> Twins:
    return twins("llava")


@pytest.fixture(scope="module")
def alone() -> Twins:
    return twins("llava", sequences=1)


def test_plain_call_returns_ids(models: Twins) -> None:
    ours, theirs = models.assert_same(max_new_tokens=NEW)
    assert torch.equal(ours[:, : models.columns], models.inputs["input_ids"])
    assert ours.dtype == theirs.dtype and ours.shape[1] == models.columns + NEW


def test_ids_as_first_argument(models: Twins) -> None:
    ids = models.inputs["input_ids"][-1:, -5:].clamp_max(IMAGE_ID - 2)
    expected = models.stock.generate(ids, max_new_tokens=NEW)
    assert torch.equal(models.ours.generate(ids, max_new_tokens=NEW), expected)


def test_text_only_prompt(llava: Twins) -> None:
    inputs = random_batch(llava.stock, images=(0, 0), seed=3).inputs()
    expected = llava.stock.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(llava.ours.generate(**inputs, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_transition_scores(models: Twins, beams: int) -> None:
    options = {**KEPT, "output_scores": True, "num_beams": beams}
    ours, theirs = models.assert_same(**options)
    results = [
        model.compute_transition_scores(
            out.sequences, out.scores, out.get("beam_indices"), normalize_logits=beams == 1
        )
        for model, out in ((models.ours, ours), (models.stock, theirs))
    ]
    models.assert_close("transition scores", *results)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_hidden_states(models: Twins, options: dict[str, Any]) -> None:
    ours, theirs = models.assert_same(**KEPT, output_hidden_states=True, **options)
    real = models.inputs["attention_mask"].bool().repeat_interleave(options.get("num_beams", 1), 0)
    assert len(ours.hidden_states) == NEW
    for step, states in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        for layer, (actual, expected) in enumerate(zip(*states, strict=True)):
            rows = real if step == 0 else torch.ones(expected.shape[:2], dtype=torch.bool)
            models.assert_close(f"[{step}][{layer}]", actual[rows], expected[rows])


@pytest.mark.parametrize("given", ["all ids", "new ids"])
def test_second_turn_on_a_kept_cache(models: Twins, given: str) -> None:
    first, _ = models.assert_same(**KEPT)
    more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    ids = torch.cat((first.sequences, more), dim=1)
    mask = torch.cat((models.inputs["attention_mask"], torch.ones(3, NEW + 3, dtype=torch.long)), 1)
    answers = []
    for model in (models.ours, models.stock):
        cache = model.generate(**models.inputs, **KEPT)[CACHE_NAME]
        new = ids if given == "all ids" else ids[:, cache.get_seq_length() :]
        answers.append(
            model.generate(
                input_ids=new,
                attention_mask=mask,
                **{CACHE_NAME: cache},
                output_logits=True,
                **KEPT,
            )
        )
    models.assert_same_output(*answers)


@pytest.mark.parametrize("classes", [True, False], ids=["with classes", "without"])
def test_embeddings(models: Twins, classes: bool) -> None:
    ids, mask = models.inputs["input_ids"], models.inputs["attention_mask"]
    embedded = models.stock.get_input_embeddings()(ids.clamp_max(IMAGE_ID - 2))
    given = {"inputs_embeds": embedded, "attention_mask": mask, "output_logits": True, **KEPT}
    expected = models.stock.generate(**given)
    if classes:
        given["token_classes"] = torch.where(ids == IMAGE_ID, 0, 1)
    models.assert_same_output(models.ours.generate(**given), expected)


def test_prompt_scoring(models: Twins) -> None:
    labels = models.inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with torch.no_grad():
        ours = models.ours(**models.inputs, labels=labels)
        theirs = models.stock(**models.inputs, labels=labels)
    models.assert_close("loss", ours.loss, theirs.loss)
    real = models.inputs["attention_mask"].bool()
    models.assert_close("logits", ours.logits[real], theirs.logits[real])


def test_streamer_prints_what_the_untouched_model_says(
    alone: Twins, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(build_tokenizer(), skip_prompt=True)
    printed = []
    for model in (alone.ours, alone.stock):
        model.generate(**alone.inputs, max_new_tokens=NEW, streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_streamer_in_a_thread(alone: Twins) -> None:
    tokenizer = build_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**alone.inputs, "max_new_tokens": NEW, "streamer": streamer}
    thread = threading.Thread(target=alone.ours.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(alone.greedy[0])


def test_streamer_gets_the_prompt_and_every_token(alone: Twins) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append([])

    recorders = Recorder(), Recorder()
    for model, recorder in zip((alone.ours, alone.stock), recorders, strict=True):
        model.generate(**alone.inputs, max_new_tokens=3, streamer=recorder)
    assert recorders[0].seen == recorders[1].seen
    assert len(recorders[0].seen) == 5


DRAFT = {"schema_version": 1, "rules": [{"layers": "1:", "tokens": "all", "skip": ["ffn"]}]}


@pytest.mark.parametrize("kind", ["llava", "llama", "llava_opt"])
@pytest.mark.parametrize("assistant", ["skipped copy", "shared weights", "untouched"])
def test_assisted_decoding_says_what_greedy_says(kind: str, assistant: str) -> None:
    models = twins(kind, sequences=1)
    helper: Any = models.stock
    if assistant == "skipped copy":
        helper = fastskip.set_policy(copy.deepcopy(models.ours), DRAFT)
    elif assistant == "shared weights":
        helper = fastskip.set_policy(copy_that_shares_weights(models.ours), DRAFT)
    expected = models.stock.generate(**models.inputs, max_new_tokens=3 * NEW)
    options = {**models.inputs, "max_new_tokens": 3 * NEW, "assistant_model": helper}
    assert torch.equal(models.ours.generate(**options), expected)


def copy_that_shares_weights(model: Any) -> Any:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def test_weights_stay_shared_with_an_assistant(alone: Twins) -> None:
    model = copy.deepcopy(alone.ours)
    helper = fastskip.set_policy(copy_that_shares_weights(model), DRAFT)
    model.generate(**alone.inputs, max_new_tokens=2)
    before = [p.data_ptr() for p in model.parameters()]
    model.generate(**alone.inputs, max_new_tokens=NEW, assistant_model=helper)
    assert [p.data_ptr() for p in model.parameters()] == before
    assert [p.data_ptr() for p in helper.parameters()] == before


def test_pipeline() -> None:
    stock: Any = tiny_llava(vocab=VOCAB)
    processor = build_processor()
    picture = Image.effect_noise((13, 11), 60).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    answers = []
    for model in (fastskip.apply_(copy.deepcopy(stock)), stock):
        pipe: Any = pipeline("image-text-to-text", model=model, processor=processor)
        answers.append(
            pipe([{"role": "user", "content": parts}], generate_kwargs={"max_new_tokens": NEW})
        )
    texts = [answer[0]["generated_text"][-1]["content"] for answer in answers]
    assert texts[0] == texts[1] != ""


def test_default_generation_config_is_the_models_own(alone: Twins) -> None:
    model = copy.deepcopy(alone.ours)
    model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert torch.equal(model.generate(**alone.inputs)[:, alone.columns :], alone.greedy[:, :3])
