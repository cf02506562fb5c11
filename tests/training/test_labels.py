"""What is learned, token by token, against conversations written out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.demo.text import build_processor as build_demo_processor
from fastskip.prompts import build_inputs
from fastskip.study.training import DataError, Example, Padding, Turn
from fastskip.study.training.batches import Collator
from fastskip.study.training.encoding import IGNORED, Encoder
from tests.checkpoints import (
    CHAT_TEMPLATE,
    IMAGE_ID,
    PROCESSED,
    VOCAB,
    build_processor,
    build_tokenizer,
)
from tests.models import LLAVA_KINDS, PAD_ID, Kind, tiny_llava
from tests.training.conversations import examples, picture, processor

HUB_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n"
    "{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As the hub's llava-1.5 checkpoints have it: no end token behind an answer."""
CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""As Qwen2's: answers end with a token, and a line break that nobody generates follows."""
TWO_TURNS = Example((Turn("<image>\nhi", "yes"), Turn("why?", "so be it")), (picture(0),))
Pieces = list[tuple[str, bool]]


def spelled(pieces: Pieces, image_tokens: int = 4) -> tuple[Tensor, Tensor]:
    """Ids and labels of pieces of text, of which some are learned; one token a character."""
    tokenizer, ids, labels = build_tokenizer(), [], []
    for text, is_learned in pieces:
        found: list[int] = []
        for number, part in enumerate(text.split("<image>")):
            found += [IMAGE_ID] * image_tokens * bool(number)
            found += tokenizer(part, add_special_tokens=False).input_ids
        ids += found
        labels += found if is_learned else [IGNORED] * len(found)
    return torch.tensor(ids), torch.tensor(labels)


def check(processor: Any, example: Example, pieces: Pieces) -> None:
    ids, labels = spelled(pieces)
    found = Encoder(processor)(example)
    assert found["input_ids"].tolist() == ids.tolist()
    assert found["labels"].tolist() == labels.tolist()


def test_without_a_template() -> None:
    check(
        processor(),
        TWO_TURNS,
        [
            ("<s>USER: <image>\nhi ASSISTANT:", False),
            (" yes</s>", True),
            ("USER: why? ASSISTANT:", False),
            (" so be it</s>", True),
        ],
    )


def test_a_template_without_end_tokens_gets_them() -> None:
    check(
        build_processor(chat_template=HUB_TEMPLATE),
        TWO_TURNS,
        [
            ("<s>USER: <image>\nhi ASSISTANT:", False),
            (" yes</s>", True),
            ("USER: why? ASSISTANT:", False),
            (" so be it</s>", True),
        ],
    )


def test_what_follows_an_end_token_is_not_learned() -> None:
    check(
        build_processor(chat_template=CHATML),
        TWO_TURNS,
        [
            ("<s>user\n<image>hi</s>\n<s>assistant\n", False),
            ("yes</s>", True),
            ("\n<s>user\nwhy?</s>\n<s>assistant\n", False),
            ("so be it</s>", True),
        ],
    )


def test_words_of_the_demo() -> None:
    found = Encoder(build_demo_processor())(
        Example((Turn("is there a circle?", "yes"), Turn("describe the image.", "a red circle")))
    )
    words = build_demo_processor().tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert words[:9] == ["<s>", "USER:", "is", "there", "a", "circle", "?", "ASSISTANT:", "yes"]
    learned = [word for word, label in zip(words, found["labels"], strict=True) if label >= 0]
    assert learned == ["yes", "</s>", "a", "red", "circle", "</s>"]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("look", "USER: <image>\n<image>\nlook ASSISTANT:"),
        ("<image><image>\nlook", "USER: <image>\n<image>\nlook ASSISTANT:"),
        ("look\n<image>\n<image>", "USER: <image>\n<image>\nlook ASSISTANT:"),
        ("<image> or <image>?", "USER: <image>\nor <image>? ASSISTANT:"),
    ],
)
def test_where_images_stand(question: str, said: str) -> None:
    pictures = (picture(0), picture(1))
    check(
        processor(),
        Example((Turn(question, "ok"),), pictures),
        [("<s>" + said, False), (" ok</s>", True)],
    )


@pytest.mark.parametrize("kind", (*LLAVA_KINDS, *PROCESSED))
def test_prompts_are_those_of_generate(kind: Kind) -> None:
    """What comes before an answer is token for token what `build_inputs` makes of the question."""
    reader = build_processor(kind, chat_template=HUB_TEMPLATE)
    images = [picture(0, (9, 17)), picture(1, (20, 8))]
    found = Encoder(reader)(Example((Turn("which?", "both"),), tuple(images)))
    first = int((found["labels"] != IGNORED).nonzero()[0])
    prompt = build_inputs(reader, "which?", images)
    assert torch.equal(found["input_ids"][:first], prompt["input_ids"][0])
    assert torch.equal(found["pixel_values"], prompt["pixel_values"])
    ids, labels = spelled([(" both</s>", True)])
    assert torch.equal(found["labels"][first:], labels)


@pytest.mark.parametrize("kind", ["internvl", "qianfan_ocr", "janus", "smolvlm"])
def test_answers_between_images_that_processors_write_around(kind: Kind) -> None:
    encode = Encoder(processor(kind))
    shown = (picture(0), picture(1))
    first, second = Turn("<image>what?", "red"), Turn("<image>and?", "blue")
    with pytest.raises(DataError, match="an answer between two images; allowed with this"):
        encode(Example((first, second), shown))
    found = encode(Example((Turn("a", "b"), Turn("<image><image>what?", "red")), shown))
    assert encode.tokenizer.decode(found["labels"][found["labels"] >= 0]) == " b</s> red</s>"


def test_a_processor_that_writes_a_system_prompt() -> None:
    """As Janus's checkpoints have it, ahead of every text."""
    reader = build_processor("janus", chat_template=HUB_TEMPLATE)
    reader.use_default_system_prompt = True
    turns = (Turn("who?", "me"), Turn("<image>\nwhat?", "red"))
    found = Encoder(reader)(Example(turns, (picture(0),)))
    said = reader.tokenizer.decode(found["input_ids"])
    assert said.startswith("<s>You are a helpful") and said.endswith("ASSISTANT: red</s>")
    learned = found["input_ids"] == found["labels"]
    assert reader.tokenizer.decode(found["input_ids"][learned]) == " me</s> red</s>"
    assert bool((found["labels"][~learned] == IGNORED).all())


def test_text_only_models() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    found = Encoder(tokenizer)(Example((Turn("2 + 2 =", "4"),)))
    ids, labels = spelled([("<s>2 + 2 =", False), (" 4</s>", True)])
    assert torch.equal(found["input_ids"], ids) and torch.equal(found["labels"], labels)
    with pytest.raises(DataError, match="reads text"):
        Encoder(tokenizer)(TWO_TURNS)


def test_what_cannot_be_said() -> None:
    with pytest.raises(DataError, match="chat template: rewrites earlier turns"):
        Encoder(build_processor(chat_template=CHAT_TEMPLATE))(TWO_TURNS)
    with pytest.raises(DataError, match="an answer contains '</s>'"):
        Encoder(processor())(Example((Turn("hi", "yes</s>no"),)))
    with pytest.raises(DataError, match="37 tokens; allowed: at most 36 positions"):
        Encoder(processor(), max_tokens=36)(Example((Turn("a" * 16, "b"),)))


@pytest.mark.parametrize("side", list(Padding))
def test_batches(side: Padding) -> None:
    encoded = [Encoder(processor())(example) for example in examples(4)]
    batch = Collator(PAD_ID, side)(encoded)
    width = max(len(each["input_ids"]) for each in encoded)
    assert batch["input_ids"].shape == (4, width)
    for row, each in enumerate(encoded):
        real, count = batch["attention_mask"][row].bool(), len(each["input_ids"])
        ends = slice(width - count, width) if side is Padding.LEFT else slice(0, count)
        assert bool(real[ends].all()) and int(real.sum()) == count
        assert torch.equal(batch["input_ids"][row, real], each["input_ids"])
        assert torch.equal(batch["labels"][row, real], each["labels"])
        assert bool((batch["labels"][row, ~real] == IGNORED).all())
        assert bool((batch["input_ids"][row, ~real] == PAD_ID).all())
    pixels = torch.cat([each["pixel_values"] for each in encoded if "pixel_values" in each])
    assert torch.equal(batch["pixel_values"], pixels)


@pytest.mark.parametrize("kind", ["llava_next_vicuna", "llava_onevision"])
def test_crops_are_filled_up(kind: Kind) -> None:
    reader = processor(kind)
    sizes = [(8, 8), (16, 16)]
    shown = [Example((Turn("a", "b"),), (picture(0, size),)) for size in sizes]
    encoded = [Encoder(reader)(example) for example in shown]
    counts = [each["pixel_values"].shape[1] for each in encoded]
    batch = Collator(PAD_ID, Padding.RIGHT)(encoded)
    assert len(set(counts)) == 2 and batch["pixel_values"].shape[:2] == (2, max(counts))
    for row, each in enumerate(encoded):
        assert torch.equal(batch["pixel_values"][row, : counts[row]], each["pixel_values"][0])
        assert not batch["pixel_values"][row, counts[row] :].any()
        assert torch.equal(batch["image_sizes"][row], each["image_sizes"][0])


@pytest.mark.parametrize("kind", ["lighton_ocr", "idefics2", "video_llama_3"])
def test_images_that_keep_their_sizes(kind: Kind) -> None:
    encode, sizes = Encoder(processor(kind)), [(8, 16), (16, 12)]
    encoded = [encode(Example((Turn("a", "b"),), (picture(0, size),))) for size in sizes]
    alone = [each["pixel_values"] for each in encoded]
    assert len({own.shape for own in alone}) == 2
    batch = Collator(PAD_ID, Padding.RIGHT)(encoded)
    model = tiny_llava(kind, vocab=VOCAB)
    with torch.no_grad():
        together = model(**batch).logits
        for row, each in enumerate(encoded):
            one = model(**Collator(PAD_ID, Padding.RIGHT)([each])).logits[0]
            real = batch["attention_mask"][row].bool()
            assert torch.allclose(together[row, real], one, atol=1e-4)
