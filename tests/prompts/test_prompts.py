"""Prompts: the ids and pixels that Hugging Face's own path gives, or a typed error."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastskip.prompts import PromptError, build_inputs, processor_for
from tests.checkpoints import IMAGE_ID, VOCAB, build_processor, build_tokenizer, save_checkpoint
from tests.models import LLAVA_KINDS, Kind, tiny_llava

POSITIONS = 256
SIZES = ((1, 1), (10, 30), (7, 5), (40, 3))


def image(width: int = 9, height: int = 12) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@cache
def processor(kind: Kind = "llava", chat_template: bool = True) -> Any:
    return build_processor(kind) if chat_template else build_processor(kind, None)


@cache
def config() -> Any:
    return tiny_llava(vocab=VOCAB).config


def decoded(inputs: Any) -> str:
    text = str(build_tokenizer().decode(inputs["input_ids"][0], skip_special_tokens=False))
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("kind", [kind for kind in LLAVA_KINDS if kind != "llava_onevision"])
def test_inputs_are_those_of_hugging_face(kind: Kind, count: int) -> None:
    images = [image(*size) for size in SIZES[:count]]
    content = [{"type": "image", "image": each} for each in images]
    expected = processor(kind).apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs = build_inputs(processor(kind), "what?", images)
    assert inputs.keys() == expected.keys()
    for key in inputs:
        assert torch.equal(inputs[key], expected[key]), key


@pytest.mark.parametrize("kind", LLAVA_KINDS)
def test_models_take_saved_and_loaded_inputs(kind: Kind, tmp_path: Path) -> None:
    loaded = processor_for(save_checkpoint(tmp_path, kind))
    model = tiny_llava(kind, vocab=VOCAB)
    for images in ([], *([image(*size)] for size in SIZES), [image(*SIZES[1]), image(*SIZES[2])]):
        inputs = build_inputs(loaded, "what?", images, config=model.config)
        with torch.no_grad():
            logits = model(**inputs).logits  # raises if placeholders and features differ in number
        assert logits.shape == (*inputs["input_ids"].shape, VOCAB)


@pytest.mark.parametrize("kind", LLAVA_KINDS)
def test_images_stay_where_the_text_puts_them(kind: Kind) -> None:
    inputs = build_inputs(processor(kind), "a <image> b <image>?", [image(), image()])
    assert decoded(inputs) == "<s>USER: a <image> b <image>? ASSISTANT:"


def test_images_come_first_otherwise() -> None:
    inputs = build_inputs(processor(), "who?", [image(), image()])
    assert decoded(inputs) == "<s>USER: <image>\n<image>\nwho? ASSISTANT:"
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 8


@pytest.mark.parametrize(
    "text, images, expected",
    [
        ("who?", 0, "<s>USER: who? ASSISTANT:"),
        ("who?", 1, "<s>USER: <image>\nwho? ASSISTANT:"),
        ("who?", 2, "<s>USER: <image>\n<image>\nwho? ASSISTANT:"),
        ("who is <image>?", 1, "<s>USER: who is <image>? ASSISTANT:"),
    ],
)
def test_without_chat_template(text: str, images: int, expected: str) -> None:
    inputs = build_inputs(processor(chat_template=False), text, [image()] * images)
    assert decoded(inputs) == expected


def test_text_only_models(tmp_path: Path) -> None:
    tokenizer = processor_for(save_checkpoint(tmp_path, "llama"))
    assert decoded(build_inputs(tokenizer, "who <image>?")) == "<s>who <image>?"
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert decoded(build_inputs(tokenizer, "who?")) == "<s>[who?]"
    with pytest.raises(PromptError, match="images: got 1; allowed: none"):
        build_inputs(tokenizer, "who?", [image()])


def test_no_second_begin_token() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    assert decoded(build_inputs(build_processor(chat_template=template), "who?")) == "<s>who?"


@pytest.mark.parametrize(
    "text, images, message",
    [
        ("", 0, "prompt: got ''; allowed: non-empty text"),
        (" \n", 1, "prompt: got ' \\\\n'; allowed: non-empty text"),
        ("<image>", 1, "allowed: words besides"),
        ("a <image>?", 0, "1 <image> for 0 images; allowed: one <image> per image"),
        ("a <image>?", 2, "1 <image> for 2 images"),
        ("a <image> <image>?", 1, "2 <image> for 1 images"),
        ("broken \udcff", 0, "allowed: Unicode text"),
    ],
)
@pytest.mark.parametrize("chat_template", [True, False])
def test_prompts_that_do_not_fit(text: str, images: int, message: str, chat_template: bool) -> None:
    with pytest.raises(PromptError, match=message):
        build_inputs(processor(chat_template=chat_template), text, [image()] * images)


def test_videos_are_refused() -> None:
    with pytest.raises(PromptError, match="contains <video>; allowed: text and images"):
        build_inputs(processor("llava_onevision"), "a <video>?")


def test_template_that_loses_images() -> None:
    template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    blind = build_processor(chat_template=template)
    with pytest.raises(PromptError, match="chat template: writes 0 <image> for 1 images"):
        build_inputs(blind, "who?", [image()])
    assert "<image>" in decoded(build_inputs(blind, "who <image>?", [image()]))


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages + 1 }}"])
def test_template_that_fails(template: str) -> None:
    with pytest.raises(PromptError, match="chat template: .*allowed: one that accepts a user turn"):
        build_inputs(build_processor(chat_template=template), "who?")


def test_length_limit_counts_new_tokens() -> None:
    length = build_inputs(processor(), "x", [image()])["input_ids"].shape[-1]
    text = "x" * (POSITIONS - length - 4)
    full = build_inputs(processor(), text, [image()], config=config(), max_new_tokens=5)
    assert full["input_ids"].shape[-1] == POSITIONS - 5
    with pytest.raises(
        PromptError, match=r"251 tokens \(4 of images\) \+ 6 new = 257; allowed: at"
    ):
        build_inputs(processor(), text, [image()], config=config(), max_new_tokens=6)
    build_inputs(processor(), text, [image()], max_new_tokens=6)  # unchecked without a config


def test_processor_saved_before_patch_sizes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path) / "processor_config.json"
    settings = json.loads(path.read_text())
    for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        settings.pop(key)
    path.write_text(json.dumps(settings))
    inputs = build_inputs(processor_for(tmp_path), "who?", [image()])
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 4


@pytest.mark.parametrize("layout", ["separate files", "one file"])
def test_onevision_with_a_video_processor(layout: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llava_onevision")
    if layout == "one file":
        video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
        (tmp_path / "video_preprocessor_config.json").unlink()
        path = tmp_path / "processor_config.json"
        settings = json.loads(path.read_text()) | {"video_processor": video}
        path.write_text(json.dumps(settings))
    inputs = build_inputs(processor_for(tmp_path), "who?", [image(8, 8)])
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 10


@pytest.mark.parametrize("name", ["absent", "empty", "not a model", "no tokenizer", "unknown"])
def test_folders_without_a_processor(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    if name != "absent":
        folder.mkdir()
    if name == "not a model":
        (folder / "config.json").write_text("{}")
    if name == "unknown":
        (folder / "config.json").write_text('{"model_type": "abacus"}')
    if name == "no tokenizer":
        tiny_llava(vocab=VOCAB).config.save_pretrained(folder)
    with pytest.raises(PromptError, match="processor of .*allowed: a folder or hub checkpoint"):
        processor_for(folder)
