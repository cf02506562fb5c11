"""Similarities against hidden states and layers whose effect is known."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import fastskip
from fastskip.policy import TokenClass
from fastskip.study.similarity import LayerSimilarity, SimilarityError, similarities
from tests.batches import random_batch
from tests.models import Kind, tiny_llava

IMAGE = 63


def sample() -> dict[str, Any]:
    """Two prompts with an image of four tokens, the second one padded by two."""
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6, 7], [0, 0, 1] + [IMAGE] * 4 + [9]])
    mask = (ids != 0).long()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def by_class(found: tuple[LayerSimilarity, ...], token_class: TokenClass) -> list[LayerSimilarity]:
    return [each for each in found if each.token_class is token_class]


def test_blocks_as_hidden_states_say() -> None:
    model = tiny_llava(image_tokens=4)
    inputs = sample()
    found = similarities(model, [inputs], new_tokens=0)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    is_image = inputs["input_ids"] == IMAGE
    is_text = ~is_image & (inputs["attention_mask"] == 1)
    for token_class, rows, count in (
        (TokenClass.IMAGE, is_image, 8),
        (TokenClass.TEXT, is_text, 6),
    ):
        own = by_class(found, token_class)
        assert [each.layer for each in own] == [0, 1, 2, 3] and own[0].rows == count
        for each in own[:-1]:  # the last state has the final norm
            cosine = cosine_similarity(states[each.layer], states[each.layer + 1], dim=-1)[rows]
            assert each.block == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert not by_class(found, TokenClass.GENERATED)


def test_sublayers_that_add_nothing_are_alike() -> None:
    model: Any = tiny_llava(image_tokens=4)
    layers = model.model.language_model.layers
    layers[1].self_attn.o_proj.weight.data.zero_()
    layers[2].mlp.down_proj.weight.data.zero_()
    for each in similarities(model, [sample()], new_tokens=0):
        assert (each.attention == pytest.approx(1, abs=1e-6)) is (each.layer == 1)
        assert (each.ffn == pytest.approx(1, abs=1e-6)) is (each.layer == 2)
        if each.layer == 1:
            assert each.block == pytest.approx(each.ffn, abs=1e-6)
        if each.layer == 2:
            assert each.block == pytest.approx(each.attention, abs=1e-6)


def test_samples_are_weighted_by_their_rows() -> None:
    model, inputs = tiny_llava(image_tokens=4), sample()
    parts = [{name: value[row : row + 1] for name, value in inputs.items()} for row in (0, 1)]
    together = similarities(model, [inputs], new_tokens=0)
    apart = similarities(model, parts, new_tokens=0)
    for a, b in zip(together, apart, strict=True):
        assert (a.layer, a.token_class, a.rows) == (b.layer, b.token_class, b.rows)
        assert (a.block, a.attention, a.ffn) == pytest.approx(
            (b.block, b.attention, b.ffn), abs=1e-5
        )


def test_generated_rows_end_with_the_answer() -> None:
    model: Any = tiny_llava(image_tokens=4)
    endless = by_class(similarities(model, [sample()], new_tokens=3), TokenClass.GENERATED)
    assert endless[0].rows == 6
    out = model.generate(**sample(), do_sample=False, max_new_tokens=3)
    model.generation_config.eos_token_id = int(out[0, -3])  # the first answer ends at once
    rest = by_class(similarities(model, [sample()], new_tokens=3), TokenClass.GENERATED)
    second = out[1, -3:].tolist()
    end = model.generation_config.eos_token_id
    alive = second.index(end) + 1 if end in second else 3
    assert rest[0].rows == 1 + alive


@pytest.mark.parametrize("kind", ["llava_next_vicuna", "llava_onevision"])
def test_other_families_have_hooks_in_the_same_places(kind: Kind) -> None:
    model: Any = tiny_llava(kind)
    ids = torch.tensor([[1, 5, 6, 7]])
    found = similarities(model, [{"input_ids": ids}], new_tokens=2)
    assert len(found) == 8 and all(-1 <= each.block <= 1 for each in found)


def test_hooks_are_gone_afterwards() -> None:
    model: Any = tiny_llava(image_tokens=4)
    similarities(model, [sample()], new_tokens=0)
    for layer in model.model.language_model.layers:
        assert not layer._forward_hooks and not layer.self_attn._forward_hooks


def test_errors() -> None:
    model = tiny_llava(image_tokens=4)
    with pytest.raises(ValueError, match="samples: 0"):
        similarities(model, [])
    with pytest.raises(ValueError, match="new_tokens: -1"):
        similarities(model, [sample()], new_tokens=-1)
    fastskip.apply_(model, "dense")
    with pytest.raises(TypeError, match="is prepared"):
        similarities(model, [sample()])


def test_a_model_that_says_a_placeholder() -> None:
    """Its answer is read again, where no image would fill it."""
    model = tiny_llava("internvl")
    image_id = model.config.image_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[image_id] = 1
        model.get_output_embeddings().weight[image_id - 9] = -1
    given = random_batch(model, 3, images=(1, 2)).inputs()
    assert similarities(model, [given], new_tokens=2)


def test_hidden_states_that_overflow_have_no_similarity() -> None:
    model: Any = tiny_llava(image_tokens=4)
    model.model.language_model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(SimilarityError, match="layer 1: .* not finite in torch.float32; allowed"):
        similarities(model, [sample()], new_tokens=0)
