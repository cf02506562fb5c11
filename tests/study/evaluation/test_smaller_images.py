"""Smaller images: fewer rows, by the vision tower's own interpolation."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import fastskip
from fastskip.demo import checkpoint_path
from fastskip.prompts import build_batch, processor_for
from fastskip.study.evaluation.smaller_images import (
    SmallerImagesError,
    shrunk_processor,
    taking_smaller_images,
)


def test_a_quarter_of_the_rows() -> None:
    model = fastskip.load_model(checkpoint_path(), dtype="float32", device="cpu")
    processor = processor_for(str(checkpoint_path()))
    picture = Image.effect_noise((96, 96), 80).convert("RGB")
    inputs = [
        build_batch(own, ["What is it?"], [[picture]])
        for own in (processor, shrunk_processor(processor, 2))
    ]
    rows = [int((each["input_ids"] == model.config.image_token_id).sum()) for each in inputs]
    assert rows == [64, 16]
    with torch.no_grad():
        expected = model.model.vision_tower(
            inputs[1]["pixel_values"], interpolate_pos_encoding=True
        ).last_hidden_state
        seen = []
        tower = model.model.vision_tower
        hook = tower.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
        with taking_smaller_images(model):
            model(**inputs[1])
        hook.remove()
    assert torch.equal(seen[0], expected)
    with pytest.raises(ValueError, match="size"):
        model(**inputs[1])  # it is as it was


@pytest.mark.parametrize("factor", [1, 0, 2.0, True, 3])
def test_impossible_factors(factor: object) -> None:
    processor = processor_for(str(checkpoint_path()))
    with pytest.raises(SmallerImagesError, match="factor"):
        shrunk_processor(processor, factor)  # type: ignore[arg-type]


def test_other_models() -> None:
    with (
        pytest.raises(SmallerImagesError, match="model: of type None"),
        taking_smaller_images(SimpleNamespace()),
    ):
        pass
