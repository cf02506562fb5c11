"""Families of LLaVA's build that are not LLaVA: what differs in them, and videos.

Each is compared with untouched Hugging Face, and with the masked dense computation.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FastVlmConfig, InternVLForConditionalGeneration

import fastskip
from fastskip import families
from fastskip.commands.common import Dtype, load_plain
from fastskip.decoder.cache import SkipCache
from fastskip.families import ENCODERS, UNCUT_SIDE, rows_of_crop
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.prompts import PromptError, build_batch, build_inputs, processor_for
from fastskip.prompts.rendering import Renderer
from fastskip.study.bench.contenders import Models
from fastskip.study.training.parts import names_of
from fastskip.study.training.settings import Parts
from fastskip.verification.cells import IMAGE, TEXT
from tests.agreement import Trio, expected
from tests.batches import BY_PATCHES, MERGE, PATCHED, UNCUT, Batch, random_batch
from tests.budget import assert_within_budget
from tests.checkpoints import (
    LOADABLE,
    OWN_PROMPTS,
    VOCAB,
    answer,
    save_checkpoint,
)
from tests.generating import NEW, Twins, twins
from tests.models import CROP, PATCH, RELATIVES, Kind, build_model, tiny_llava, tiny_text_only
from tests.policies import MIXED, policy_of, skip
from tests.prompts.test_prompts import SIZES, image

POLICY = MIXED["each class its own rule"]
VIDEOS: tuple[Kind, ...] = ("llava_next_video", "video_llava", "perception_lm", "video_llama_3")
IMPLS = ["reference", "torch"]


@pytest.fixture(scope="module", params=RELATIVES)
def pair(request: pytest.FixtureRequest) -> Twins:
    return twins(request.param)


def test_an_empty_policy_is_the_untouched_model(pair: Twins) -> None:
    # Without a cache Hugging Face takes a generated placeholder for an image, and raises.
    reserved = {"suppress_tokens": [VOCAB - 2, VOCAB - 1]}
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False, **reserved}):
        pair.assert_same(max_new_tokens=NEW, **options)
    assert isinstance(pair.ours, type(pair.stock))


def test_forwards_bring_a_cache_of_their_own(pair: Twins) -> None:
    with torch.no_grad():
        ours, theirs = pair.ours(**pair.inputs), pair.stock(**pair.inputs)
        real = pair.inputs["attention_mask"].bool()
        pair.assert_close("logits", ours.logits[real], theirs.logits[real])
        assert isinstance(ours[CACHE_NAME], SkipCache)
        assert pair.ours(**pair.inputs, use_cache=False).get(CACHE_NAME) is None
        with pytest.raises(TypeError, match="needs a cache that it returned itself"):
            pair.ours(**pair.inputs, **{CACHE_NAME: theirs[CACHE_NAME]})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", RELATIVES)
def test_policies(kind: Kind, impl: str) -> None:
    trio = Trio(tiny_llava(kind), impl)
    batch = random_batch(trio.plain, 2, images=(2, 0, 1))
    trio.check_forward(POLICY, batch)
    trio.check_greedy(POLICY, batch)


@pytest.mark.parametrize("kind", RELATIVES)
def test_loading(kind: Kind, tmp_path: Path) -> None:
    like: Any = tiny_llava(kind, vocab=VOCAB)
    # transformers 5.17 reads whatever encoder this family has as timm's.
    given = {"config": like.config} if kind == "perception_lm" else {}
    model = fastskip.load_model(save_checkpoint(tmp_path, kind), **given)
    stock = type(like).from_pretrained(tmp_path, **given)
    assert isinstance(model, type(stock))
    assert answer(model) == answer(stock)


def _load_plain(path: Path) -> Any:
    return load_plain(str(path), FastVlmConfig(), Dtype.AUTO, "cpu")


@pytest.mark.parametrize(
    "load",
    [fastskip.load_model, lambda path: Models.load(str(path)), _load_plain],
    ids=["load_model", "bench", "verify and search"],
)
def test_an_encoder_of_a_package_that_is_missing(
    load: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FastVlmConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    with pytest.raises(fastskip.UnsupportedModelError, match="timm_wrapper.*pip install timm"):
        load(tmp_path)


@pytest.mark.parametrize("kind", LOADABLE)
def test_prompts(kind: Kind, tmp_path: Path) -> None:
    processor = processor_for(save_checkpoint(tmp_path, kind))
    model = tiny_llava(kind, vocab=VOCAB)
    for images in ([], *([image(*size)] for size in SIZES[1:]), [image(), image(*SIZES[2])]):
        with torch.no_grad():  # raises if placeholders and features differ in number
            model(**build_inputs(processor, "what?", images, config=model.config))
    texts = ["a <image> b?", "<image> and <image>!"]
    inputs = build_batch(processor, texts, [[image()], [image(*SIZES[1]), image()]])
    with torch.no_grad():
        model(**inputs)
    for row, text in enumerate(texts):
        found = processor.tokenizer.decode(inputs["input_ids"][row], skip_special_tokens=True)
        words = text.replace("<image>", "").split()
        assert all(word in found for word in words), found


@pytest.mark.parametrize("kind", OWN_PROMPTS)
def test_prompts_that_are_not_ours_to_write(kind: Kind, tmp_path: Path) -> None:
    processor = processor_for(save_checkpoint(tmp_path, kind))
    for write in (Renderer, lambda processor: build_inputs(processor, "what?", [image()])):
        with pytest.raises(PromptError, match="its own prompts; allowed: calling it yourself"):
            write(processor)
    inputs = processor(image(), return_tensors="pt", num_image_tokens=4)
    ours, stock = fastskip.load_model(tmp_path), type(tiny_llava(kind)).from_pretrained(tmp_path)
    assert torch.equal(*(each.generate(**inputs, max_new_tokens=4) for each in (ours, stock)))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_stands_around_images_is_text(impl: str) -> None:
    """Even where the model has embeddings of its own for it, beside those of the image's rows."""
    trio = Trio(tiny_llava("ovis2"), impl)
    batch = random_batch(trio.plain, images=(1, 2))
    ends: list[int] = trio.plain.config.visual_indicator_token_ids
    words = batch.real & (batch.token_classes == TEXT)
    around = torch.tensor(ends).repeat(batch.columns)[: int(words.sum())]
    batch = replace(batch, input_ids=batch.input_ids.masked_scatter(words, around))
    trio.check_forward(POLICY, batch)
    trio.check_greedy(POLICY, batch)


def clip(model: Any) -> dict[str, Tensor]:
    """A prompt with a video of two frames between words."""
    side = {"video_llava": 2 * PATCH, "perception_lm": 4 * PATCH}.get(model.config.model_type, CROP)
    frames = torch.randn(1, 2, 3, side, side, generator=torch.Generator().manual_seed(3))
    where: dict[str, Tensor] = {}
    if model.config.model_type in PATCHED:
        frames = frames.view(-1, 3 * PATCH**2)
        grid = torch.tensor([[2, side // PATCH, side // PATCH]])
        where = {"video_grid_thw": grid, "video_merge_sizes": torch.tensor([MERGE])}
    # Where frames are to the model what tiles of an image are, it has no other name for it.
    see = getattr(model.model, "get_video_features", model.model.get_image_features)
    with torch.no_grad():
        features = see(frames, **where).pooler_output
    rows = sum(own.numel() // own.shape[-1] for own in features)
    ids = torch.tensor([[5, 6, *[model.config.video_token_id] * rows, 7, 8, 9]])
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": frames, **where}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", VIDEOS)
def test_rows_of_videos_are_image_rows(kind: Kind, impl: str) -> None:
    trio = Trio(tiny_llava(kind), impl)
    given = clip(trio.plain)
    with torch.no_grad():
        stock = trio.plain.generate(**given, max_new_tokens=4)
    assert torch.equal(trio.under(policy_of()).generate(**given, max_new_tokens=4), stock)
    policy = policy_of(skip([1, 2], ["image"], "ffn"))
    plain, truth = trio.expected(policy, **given)
    with torch.no_grad():
        found = trio.under(policy)(**given).logits
    assert_within_budget("logits", found, plain, truth)
    assert (plain - expected(trio.plain, {}, **given)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "kind", ["llava", *(kind for kind in RELATIVES if not kind.startswith("llava_next"))]
)
def test_rows_of_a_crop(kind: Kind) -> None:
    model = tiny_llava(kind)
    batch = random_batch(model, images=(1,))
    rows = int((batch.token_classes == IMAGE).sum())
    if kind in PATCHED:
        merge = MERGE if kind in BY_PATCHES else 1  # of the others' images, not of their videos
        rows = (UNCUT_SIDE // (merge * PATCH)) ** 2
    if getattr(model.config.vision_config, "model_type", None) == UNCUT:
        height, width = batch.images[0][1]
        rows = rows * 16 * 16 // (height * width)  # one as large as they can be
    assert rows_of_crop(model.config) == rows > 0
    assert rows_of_crop(model.config.get_text_config()) == 0


@pytest.mark.parametrize("kind", RELATIVES)
def test_parts_that_learn(kind: Kind) -> None:
    model = tiny_llava(kind)
    projector, language = names_of(model, Parts.PROJECTOR), names_of(model, Parts.LANGUAGE)
    names = [name for name, _ in model.named_parameters()]
    seeing = {name for name in names if name.split(".")[1].startswith(ENCODERS)}
    seeing -= projector  # in some families it is a part of the encoder
    assert projector and projector < language
    assert seeing and not seeing & language
    assert seeing | language == names_of(model, Parts.EVERYTHING)


def test_what_draws_images_learns_nothing() -> None:
    """Janus's: no answer in text depends on it."""
    model: Any = tiny_llava("janus").train()
    model(**random_batch(model).inputs()).logits.sum().backward()
    learning = {name for name, own in model.named_parameters() if own.grad is not None}
    assert names_of(model, Parts.EVERYTHING) == learning
    assert names_of(model, Parts.LANGUAGE) < learning
    assert names_of(model, Parts.PROJECTOR) == {name for name in learning if ".aligner." in name}


def test_drawing_images_is_refused() -> None:
    plain: Any = tiny_llava("janus")
    model = fastskip.apply_(copy.deepcopy(plain))
    inputs = random_batch(plain).inputs()
    with pytest.raises(fastskip.UnsupportedModelError, match="generation_mode: 'image'.*: text"):
        model.generate(**inputs, generation_mode="image")
    said, stock = (
        each.generate(**inputs, generation_mode="text", max_new_tokens=4) for each in (model, plain)
    )
    assert torch.equal(said, stock)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "granite"])
def test_text_only(family: Any, impl: str) -> None:
    trio = Trio(tiny_text_only(family), impl)
    batch = random_batch(trio.plain, images=(0, 0, 0))
    policy = policy_of(skip([1], ["text"], "attention", kv="reuse"), skip([2], "all", "ffn"))
    for each in (policy_of(), policy):
        trio.check_forward(each, batch)
        trio.check_greedy(each, batch)


def check_ends_at(limit: int, ours: Any, stock: Any, batch: Batch, message: str) -> None:
    """Up to ``limit`` columns ours says what Hugging Face's does; one more is refused."""
    new = limit - batch.columns + 1  # the last one is not fed back
    given = {**batch.inputs(), "do_sample": False}
    expected = stock.generate(**given, max_new_tokens=new)
    assert torch.equal(ours.generate(**given, max_new_tokens=new), expected)
    with pytest.raises(ValueError, match=message):
        ours.generate(**given, max_new_tokens=new + 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_dynamic_rope_is_plain_up_to_its_length(impl: str) -> None:
    """InternVL's checkpoints have it; past its length the angles of all rows would change."""
    limit = 20
    config = tiny_llava("internvl").config
    config.text_config.max_position_embeddings = limit
    config.text_config.rope_parameters = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
    }
    stock: Any = build_model(InternVLForConditionalGeneration, config, 0, torch.float32)
    batch = random_batch(stock, images=(1,), text=(6, 6))
    with torch.no_grad():  # a longer text, which changes the angles until a shorter one comes
        stock(input_ids=torch.arange(2, limit + 9)[None])
    ours = fastskip.apply_(copy.deepcopy(stock), impl=impl)
    message = f"position_ids: {limit}; allowed: 0 to {limit - 1}"
    check_ends_at(limit, ours, stock, batch, message)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("of_every_layer", [True, False])
def test_a_sliding_window_is_none_as_long_as_nothing_slides(
    impl: str, of_every_layer: bool
) -> None:
    """BakLLaVA's has 4096 columns. Beyond it Hugging Face's rows no longer see the first ones."""
    like: Any = tiny_llava("llava_next_mistral" if of_every_layer else "internvl")
    batch = random_batch(like, images=(1, 0), text=(2, 6))
    config, text, window = like.config, like.config.text_config, batch.columns + 4
    text.sliding_window = window
    if not of_every_layer:
        text.layer_types = ["full_attention", *["sliding_attention"] * (text.num_hidden_layers - 1)]
    stock: Any = build_model(type(like), config, 0, torch.float32)
    ours = fastskip.apply_(copy.deepcopy(stock), impl=impl)
    message = f"sliding_window: {window + 1} columns; .* {window}"
    check_ends_at(window, ours, stock, batch, message)
    with pytest.raises(ValueError, match=f"sliding_window: {window + 2} columns"):
        ours(torch.full((1, window + 2), 5))
