"""Every documented option of `generate` means what it means to the untouched model.

Left out because stock models cannot run them without code from the hub: contrastive search, DoLa,
group and constrained beams.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from tests.checkpoints import IMAGE_ID, VOCAB, build_tokenizer
from tests.generating import NEW, Twins, twins
from tests.models import tiny_llama

Options = dict[str, Any]
Make = Callable[[Twins], Options]
EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(scope="module", params=["llava", "llama", "opt"])
def models(request: pytest.FixtureRequest) -> Twins:
    return twins(request.param)


class Halve(LogitsProcessor):
    """Writes to the scores that it is given, as some processors do."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : VOCAB // 2] *= 0.5
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


class MultipleOfThree(StoppingCriteria):
    """Stops sequences one by one, by their last token."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 3 == 0


SAMPLING: dict[str, Options] = {
    "defaults": {},
    "all tokens": {"top_k": 0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "top_h": {"top_h": 0.4, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "typical_p": {"typical_p": 0.6, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, "top_k": 0},
    "eta_cutoff": {"eta_cutoff": 0.02, "top_k": 0},
    "renormalize_logits": {"top_k": 9, "renormalize_logits": True},
    "num_return_sequences": {"num_return_sequences": 3},
    "use_cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "watermark": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=2)},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
def test_sampling_with_a_seed(models: Twins, options: Options) -> None:
    # The untouched model looks for image features again wherever it has said the image token.
    models.assert_same(
        do_sample=True, max_new_tokens=NEW, suppress_tokens=[IMAGE_ID], **EVERYTHING, **options
    )


OPTIONS: dict[str, Make] = {
    "greedy": lambda m: {},
    "repetition_penalty": lambda m: {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": lambda m: {"encoder_repetition_penalty": 1.7},
    "no_repeat_ngram_size": lambda m: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda m: {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": lambda m: {"bad_words_ids": m.greedy[:, 1:3].tolist()},
    "sequence_bias": lambda m: {"sequence_bias": [[[said(m, 0, 0)], -9.0], [[7, 8], 9.0]]},
    "suppress_tokens": lambda m: {"suppress_tokens": m.greedy[:, 2].tolist()},
    "begin_suppress_tokens": lambda m: {"begin_suppress_tokens": m.greedy[:, 0].tolist()},
    "forced_bos_token_id": lambda m: {"forced_bos_token_id": 5},
    "forced_eos_token_id": lambda m: {"forced_eos_token_id": 6},
    "renormalize_logits": lambda m: {"renormalize_logits": True},
    "remove_invalid_values": lambda m: {
        "remove_invalid_values": True,
        "bad_words_ids": m.greedy[:, :1].tolist(),
    },
    "logits_processor": lambda m: {"logits_processor": LogitsProcessorList([Halve()])},
    "prefix_allowed_tokens_fn": lambda m: {
        "prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20, int(ids[-1]) // 2 + 4]
    },
    "guidance_scale": lambda m: {"guidance_scale": 1.6},
    "guidance_scale with a negative prompt": lambda m: {
        "guidance_scale": 1.6,
        "negative_prompt_ids": torch.tensor([[5, 6, 7], [1, 8, 9], [3, 3, 4]]),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]]),
    },
    "watermarking_config": lambda m: {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "watermarking_config selfhash": lambda m: {
        "watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")
    },
    "max_new_tokens": lambda m: {"max_new_tokens": 1},
    "max_length": lambda m: {"max_length": m.columns + 3, "max_new_tokens": None},
    "max_time": lambda m: {"max_time": 0.0},
    "low_memory": lambda m: {"low_memory": True},
    "cache_implementation": lambda m: {"cache_implementation": "dynamic"},
    "prefill_chunk_size": lambda m: {"prefill_chunk_size": 3},
    "use_cache": lambda m: {"use_cache": False, "suppress_tokens": [IMAGE_ID]},
    "num_beams": lambda m: {"num_beams": 3},
    "num_beams without cache": lambda m: {
        "num_beams": 3,
        "use_cache": False,
        "suppress_tokens": [IMAGE_ID],
    },
    "num_beams and num_return_sequences": lambda m: {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS.keys())
def test_option(models: Twins, make: Make) -> None:
    models.assert_same(**{"max_new_tokens": NEW, **EVERYTHING, **make(models)})


# These end sequences at different steps, so tokens are compared and scores are not: those of a
# sequence that has ended are nobody's promise.
ENDINGS: dict[str, Make] = {
    "eos_token_id": lambda m: {"eos_token_id": said(m, 0, 2)},
    "eos_token_id at once": lambda m: {"eos_token_id": said(m, 0, 0)},
    "eos_token_id list": lambda m: {"eos_token_id": [said(m, 0, 2), said(m, 1, 4)]},
    "eos_token_id of all": lambda m: {"eos_token_id": m.greedy[:, 3].tolist()},
    "eos_token_id without cache": lambda m: {
        "eos_token_id": said(m, 0, 2),
        "use_cache": False,
        "suppress_tokens": [IMAGE_ID],
    },
    "pad_token_id": lambda m: {"eos_token_id": said(m, 0, 2), "pad_token_id": 9},
    "min_new_tokens": lambda m: {"eos_token_id": m.greedy[:, 1].tolist(), "min_new_tokens": 4},
    "min_length": lambda m: {
        "eos_token_id": m.greedy[:, 1].tolist(),
        "min_length": m.columns + 4,
    },
    "exponential_decay_length_penalty": lambda m: {
        "eos_token_id": 6,
        "exponential_decay_length_penalty": (2, 1.9),
    },
    "stop_strings": lambda m: {
        "stop_strings": [build_tokenizer().decode(m.greedy[0, 2:4]), "never said"],
        "tokenizer": build_tokenizer(),
    },
    "stopping_criteria": lambda m: {"stopping_criteria": StoppingCriteriaList([MultipleOfThree()])},
    "generation_config": lambda m: {
        "generation_config": GenerationConfig(
            max_new_tokens=5, repetition_penalty=1.3, pad_token_id=0, eos_token_id=said(m, 1, 3)
        ),
        "max_new_tokens": 6,
    },
    "num_beams": lambda m: {"num_beams": 3, "eos_token_id": m.greedy[:, 2].tolist()},
    "length_penalty": lambda m: {
        "num_beams": 3,
        "length_penalty": -2.0,
        "eos_token_id": m.greedy[:, 3].tolist(),
    },
    "early_stopping": lambda m: {
        "num_beams": 3,
        "early_stopping": True,
        "eos_token_id": m.greedy[:, 3].tolist(),
    },
    "early_stopping never": lambda m: {
        "num_beams": 3,
        "early_stopping": "never",
        "eos_token_id": m.greedy[:, 3].tolist(),
    },
}


@pytest.mark.parametrize("make", ENDINGS.values(), ids=ENDINGS.keys())
def test_option_that_ends_sequences(models: Twins, make: Make) -> None:
    models.assert_same(**{"max_new_tokens": NEW, **make(models)})


# Hugging Face's assisted decoding takes one sequence at a time.
@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_prompt_lookup(kind: str) -> None:
    twins(kind, sequences=1).assert_same(
        max_new_tokens=3 * NEW, prompt_lookup_num_tokens=3, **EVERYTHING
    )


@pytest.mark.parametrize("name", ["static", "offloaded", "quantized", "offloaded_static"])
def test_other_caches_are_refused(models: Twins, name: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation.*{name}"):
        models.ours.generate(**models.inputs, max_new_tokens=2, cache_implementation=name)


def said(models: Twins, row: int, step: int) -> int:
    """A token of the greedy answer."""
    return int(models.greedy[row, step])


def test_drafts_on_a_kept_cache_are_refused() -> None:
    """Hugging Face's loop would feed the whole prompt again behind what the cache holds."""
    model = fastskip.apply_(tiny_llama())
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    turn = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    more = torch.cat((turn.sequences, ids), dim=1)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: with a non-empty cache"):
        model.generate(more, prompt_lookup_num_tokens=2, **{CACHE_NAME: turn[CACHE_NAME]})


def test_drafts_behind_pads_are_refused() -> None:
    """Hugging Face's loop would go on from the last column."""
    model, ids = fastskip.apply_(tiny_llama()), torch.tensor([[5, 6, 7, 5, 6, 0]])
    options = {"max_new_tokens": 3, "do_sample": False}
    before = {"input_ids": ids.roll(1), "attention_mask": (ids.roll(1) > 0).long(), **options}
    found = model.generate(**before, prompt_lookup_num_tokens=2)
    assert torch.equal(found, model.generate(**before))
    behind = {"input_ids": ids, "attention_mask": (ids > 0).long(), **options}
    assert torch.equal(model.generate(**behind)[:, 6:], found[:, 6:])
    with pytest.raises(ValueError, match="right-padded prompts"):
        model.generate(**behind, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("width", [3, 12])
def test_classes_of_a_prompt_of_another_width(width: int) -> None:
    model = fastskip.apply_(tiny_llama())
    expected = rf"token_classes: shape \(1, {width}\); needed: \[1, 5\]"
    with pytest.raises(ValueError, match=expected):
        model.generate(
            torch.tensor([[5, 6, 7, 5, 6]]),
            token_classes=torch.ones(1, width, dtype=torch.long),
            max_new_tokens=2,
        )
