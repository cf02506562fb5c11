"""Where images lie among a prompt's columns is worked out on the host, whatever else runs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

import fastskip
from fastskip.generation.prepared import PreparedBackbone
from tests.batches import random_batch
from tests.models import LLAVA_KINDS, RELATIVES, Kind, tiny_llava

WITHOUT = {"idefics2", "idefics3", "smolvlm"}
"""Families that some versions of transformers fill without asking where placeholders are."""


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_llava()


@pytest.mark.parametrize("kind", [*LLAVA_KINDS, *RELATIVES])
def test_hugging_face_compares_numbers_of_the_host(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_llava(kind)
    model = fastskip.apply_(copy.deepcopy(plain))
    batch = random_batch(plain, seed=0)
    ids = batch.inputs()["input_ids"]
    base: Any = type(plain.model)
    seen: list[tuple[Tensor, Tensor]] = []
    find = getattr(base, "get_placeholder_mask", None)
    assert find is not None or kind in WITHOUT

    def spy(self: Any, input_ids: Any, inputs_embeds: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((input_ids, inputs_embeds))
        assert find is not None
        return find(self, input_ids, inputs_embeds, *args, **kwargs)

    if find is not None:
        monkeypatch.setattr(base, "get_placeholder_mask", spy)
    with torch.no_grad():
        expected = plain(**batch.inputs()).logits
        # On transformers 5.17 DeepSeek-VL 7B has the method and does not call it.
        asks = bool(seen)
        assert asks == (find is not None) or kind == "deepseek_vl_hybrid"
        seen.clear()
        found = model(**batch.inputs()).logits
    real = batch.inputs()["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)
    for given, like in seen:
        # The host's own ids, and of the embeddings nothing but their shape.
        assert torch.equal(given, ids)
        assert like.shape[:2] == ids.shape and like.stride() == (0, 0, 0)
    assert bool(seen) == asks


def test_a_wrong_number_of_placeholders_is_said(plain: PreTrainedModel) -> None:
    model = fastskip.apply_(copy.deepcopy(plain))
    inputs = random_batch(plain, seed=0).inputs()
    ids = inputs["input_ids"].clone()
    place = (ids == plain.config.image_token_id).nonzero()[0]
    ids[tuple(place)] = 1
    messages = []
    for each in (plain, model):
        with pytest.raises((ValueError, RuntimeError)) as caught, torch.no_grad():
            each(**{**inputs, "input_ids": ids})
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "do not match" in messages[0]
    assert model._fastskip.ids is None


def test_other_ids_are_asked_as_ever(plain: PreTrainedModel) -> None:
    """Outside of the model's own forward, and of embeddings, Hugging Face is asked."""
    model = fastskip.apply_(copy.deepcopy(plain))
    assert isinstance(model.model, PreparedBackbone)
    ids = random_batch(plain, seed=0).inputs()["input_ids"]
    embeddings = plain.get_input_embeddings()(ids)
    count = int((ids == plain.config.image_token_id).sum())
    features = torch.zeros(1, count, embeddings.shape[-1])
    for given in (ids, None):
        masks = [
            each.model.get_placeholder_mask(
                given, inputs_embeds=embeddings, image_features=features
            )
            for each in (plain, model)
        ]
        assert torch.equal(*masks)
