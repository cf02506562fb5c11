"""Quality gates of the bundled checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from fastskip.demo import checkpoint_path
from fastskip.demo.evaluation import answers, evaluate, held_out, prompt
from fastskip.demo.model import Size
from fastskip.demo.scenes import QuestionKind, Split, draw, scenes
from fastskip.demo.smaller import TOWER, load, weights_path, write_checkpoint

QUESTIONS = [kind for kind in QuestionKind if kind is not QuestionKind.CAPTION]


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoint_path()


@pytest.fixture(scope="module")
def processor(folder: Path) -> LlavaProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_size(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 12 * 2**20


def test_layout_is_the_hubs(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
    assert "language_model.lm_head.weight" in names
    parts = (
        "language_model.model.",
        "language_model.lm_head.",
        "multi_modal_projector.",
        "vision_tower.vision_model.",
    )
    assert all(name.startswith(parts) for name in names)


def test_loads_without_missing_or_unexpected_keys(folder: Path) -> None:
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.text_config.num_hidden_layers >= 8
    assert type(model) is LlavaForConditionalGeneration


def test_prompt_is_llavas(processor: LlavaProcessor) -> None:
    text = prompt(processor, "Is there a red circle?")
    assert text == "USER: <image>\nIs there a red circle? ASSISTANT:"
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "where?"},
    ]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered == "USER: <image>\nhow many? ASSISTANT: two</s>USER: where? ASSISTANT:"


def test_words(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer("What COLOR is the circle?").input_ids[1:]) == (
        "what colour is the circle ?"
    )
    assert tokenizer("zebra", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


def test_exact_match_on_held_out_questions(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    accuracy = evaluate(model, processor, held_out(120, seed=11, kinds=QUESTIONS), batch_size=40)
    assert accuracy.overall >= 0.95, accuracy.table()


def test_later_turns_are_answered(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    right = 0
    found = scenes(Split.TEST, 10, seed=12)
    for scene in found:
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "how many objects are there?"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {
                        "type": "text",
                        "text": ["", "one", "two", "three", "four", "five"][len(scene.figures)],
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": f"is there a {scene.figures[0].name}?"},
                ],
            },
        ]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=[draw(scene)], text=[text], return_tensors="pt")
        out = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(out, skip_special_tokens=True).strip() == "yes"
    assert right >= 8


def test_answers_do_not_depend_on_the_batch(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    items = held_out(12, seed=13)
    assert answers(model, processor, items, 12) == answers(model, processor, items, 1)


def test_all_models_together_are_small(folder: Path) -> None:
    files = [*folder.rglob("*"), *weights_path(Size.SMALL).parent.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


@pytest.mark.parametrize(("size", "least"), [(Size.MEDIUM, 0.8), (Size.SMALL, 0.5)])
def test_smaller_models_answer_too(size: Size, least: float, processor: LlavaProcessor) -> None:
    found = evaluate(load(size), processor, held_out(120, seed=14, kinds=QUESTIONS), batch_size=60)
    assert found.overall >= least, found.table()


def test_smaller_models_are_stored_without_the_tower(model: LlavaForConditionalGeneration) -> None:
    tower = {n: p for n, p in model.state_dict().items() if n.startswith(TOWER)}
    for size in (Size.MEDIUM, Size.SMALL):
        with safe_open(weights_path(size), "pt") as file:
            names = set(file.keys())
            assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
        assert all(name.startswith(("language_model.", "multi_modal_projector.")) for name in names)
        smaller = load(size).state_dict()
        assert tower and all(torch.equal(smaller[name], value) for name, value in tower.items())


def test_loading_the_large_size_is_loading_the_folder(model: LlavaForConditionalGeneration) -> None:
    ours = load(Size.LARGE).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def test_a_smaller_model_as_a_folder(tmp_path: Path) -> None:
    write_checkpoint(Size.SMALL, tmp_path)
    read, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ours = load(Size.SMALL).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in read.state_dict().items())
