"""Prompts with a history: what training learns up to an answer, and what one turn has been."""

from typing import Any

import pytest

from fastskip.demo.text import build_processor as build_demo_processor
from fastskip.prompts import build_inputs, encode_prompts
from fastskip.prompts.conversations import DataError, Turn
from fastskip.prompts.rendering import Renderer
from tests.checkpoints import CHAT_TEMPLATE, build_processor, build_tokenizer
from tests.training.conversations import examples, picture
from tests.training.test_labels import CHATML, HUB_TEMPLATE

PROCESSORS = {
    "none": build_processor(chat_template=None),
    "hub": build_processor(chat_template=HUB_TEMPLATE),
    "chatml": build_processor("llava_onevision", chat_template=CHATML),
    "demo": build_demo_processor(),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_prompt_ends_where_an_answer_begins(name: str) -> None:
    renderer = Renderer(PROCESSORS[name])
    for example in examples(6):
        text, spans = renderer.render(example)
        *history, last = example.turns
        prompt = renderer.prompt(history, last.question, len(example.images), "it")
        assert prompt == text[: spans[-1][0]] and text[spans[-1][0] :].strip().startswith(
            last.answer
        )
        assert all(turn.answer in prompt for turn in history)


@pytest.mark.parametrize("name", PROCESSORS)
def test_one_turn_is_what_build_inputs_makes(name: str) -> None:
    processor: Any = PROCESSORS[name]
    prompt = Renderer(processor).prompt((), "what is it?", 1, "it")
    found = encode_prompts(processor, [prompt], [[picture(0)]])
    expected = build_inputs(processor, "what is it?", [picture(0)])
    assert found.input_ids.tolist() == expected.input_ids.tolist()


SYSTEM = {
    "none": "be brief USER: ",
    "hub": "SYSTEM: be brief USER: ",
    "chatml": "<s>system\nbe brief</s>\n<s>user\n",
    "demo": "USER: be brief USER: ",
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_system_stands_before_all_turns(name: str) -> None:
    renderer = Renderer(PROCESSORS[name])
    history, question = [Turn("<image>what is it?", "red")], "and <image> this?"
    plain = renderer.prompt(history, question, 2, "it")
    found = renderer.prompt(history, question, 2, "it", system=" be brief\n")
    assert found.startswith(SYSTEM[name])
    assert found.removeprefix("USER: " * (name == "demo")).endswith(plain)
    assert "and <image> this?" in plain


def test_a_text_model_reads_no_images() -> None:
    renderer = Renderer(build_tokenizer())
    assert renderer.prompt([Turn("a", "b")], "c", 0, "it") == "a b</s> c"
    assert renderer.prompt([Turn("a", "b")], "c", 0, "it", "d") == "d a b</s> c"
    with pytest.raises(DataError, match="it: has images"):
        renderer.prompt((), "a", 1, "it")


@pytest.mark.parametrize(
    ("template", "history", "question", "message"),
    [
        ("{{ raise_exception('no') }}", (), "a?", "chat template: no"),
        ("hello", (), "a?", "writes 0 <image> for 1 images"),
        (CHAT_TEMPLATE, (Turn("b", "c"),), "a?", "rewrites earlier turns"),
        (HUB_TEMPLATE, (Turn("b", "c</s>"),), "a?", "an answer contains '</s>'"),
        (HUB_TEMPLATE, (), "\ud800?", "allowed: Unicode text"),
        (HUB_TEMPLATE, (), " <image>", "allowed: non-empty text"),
        (HUB_TEMPLATE, (Turn("b", " "),), "a?", "answer ' '; allowed: non-empty text"),
    ],
)
def test_what_cannot_be_said(
    template: str, history: tuple[Turn, ...], question: str, message: str
) -> None:
    renderer = Renderer(build_processor(chat_template=template))
    with pytest.raises(DataError, match=f"the item: .*{message}"):
        renderer.prompt(history, question, 1, "the item")


def test_a_template_that_knows_no_system() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m['content'][-1]['text'] }}{% endfor %}"
    )
    renderer = Renderer(build_processor(chat_template=template))
    assert renderer.prompt((), "a?", 0, "it") == "a?"
    with pytest.raises(DataError, match="it: chat template: no; allowed: one that accepts system"):
        renderer.prompt((), "a?", 0, "it", system="be brief")
    with pytest.raises(DataError, match="it: .*allowed: Unicode text"):
        renderer.prompt((), "a?", 0, "it", system="\ud800")


def test_videos_are_refused() -> None:
    renderer = Renderer(build_processor("llava_onevision", chat_template=CHATML))
    with pytest.raises(DataError, match="contains <video>"):
        renderer.prompt((), "<video> a?", 0, "it")
