"""Rows that stand in time, height and width (Qwen2-VL, Qwen2.5-VL): what differs from one position.

That forwards, beams and policies agree with Hugging Face is in `test_relatives.py`.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

import fastskip
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.rope import RotaryTable
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.policy import TokenClass
from fastskip.prompts import build_inputs
from fastskip.prompts.rendering import Renderer
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.items import Item
from fastskip.study.search.calibrating import Calibrator
from fastskip.study.similarity import similarities
from fastskip.tokens import CODES, PAD, TokenLayout
from fastskip.verification.cells import IMAGE
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio, generate
from tests.batches import BY_PATCHES, Batch, random_batch
from tests.budget import assert_within_budget, truth_copy
from tests.checkpoints import CHAT_TEMPLATE, VOCAB, build_processor
from tests.models import PATCH, Kind, tiny_llava
from tests.policies import policy_of, skip
from tests.prompts.test_prompts import image

NEW = 6
LATER = {"attention_mask": 1, "mm_token_type_ids": 0}
"""What is said of a token that was generated."""
IMAGE_FFN = policy_of(skip([1, 2], ["image"], "ffn"))
DENSE = policy_of()
POLICIES = {"dense": DENSE, "no image FFN": IMAGE_FFN}


@pytest.fixture(
    scope="module",
    params=[*((kind, "reference") for kind in BY_PATCHES), ("qwen2_5_vl", "torch")],
    ids=" on ".join,
)
def trio(request: pytest.FixtureRequest) -> Trio:
    kind, impl = request.param
    return Trio(tiny_llava(kind), impl)


@pytest.mark.parametrize("kind", BY_PATCHES)
def test_tables_are_hugging_faces(kind: Kind) -> None:
    rotary: Any = tiny_llava(kind).get_decoder().rotary_emb
    axes = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(0))
    like = torch.zeros(1)
    cosine, sine = rotary(like, axes[:, None])
    own_cosine, own_sine = RotaryTable(rotary).at_axes(axes, 90, like)
    half = sine.shape[-1] // 2
    assert torch.equal(own_cosine[:, 0], cosine[0])
    assert torch.equal(own_sine[:, 0, half:], sine[0, :, half:])
    assert torch.equal(own_sine[:, 0, :half], -sine[0, :, :half])


def test_layouts_keep_axes() -> None:
    text, image = CODES[TokenClass.TEXT], CODES[TokenClass.IMAGE]
    source = torch.tensor([[PAD, text, image, text], [image, image, text, text]])
    positions = torch.arange(4).expand(2, -1)
    axes = torch.arange(24).view(3, 2, 4)
    groups = [frozenset({TokenClass.IMAGE}), frozenset({TokenClass.TEXT})]
    layout = TokenLayout(source, positions, 0, groups, axes=axes)
    assert layout.axes is not None
    assert layout.axes[0].tolist() == [2, 4, 5, 1, 3, 6, 7]
    left = layout.without(layout.codes == image).axes
    assert left is not None and left[1].tolist() == [9, 11, 14, 15]
    filled = layout.filled(lambda count: count + 1)
    assert filled.axes is not None
    assert filled.real(filled.axes.t()).t().tolist() == layout.axes.tolist()
    after = layout.advanced().axes
    assert after is not None and torch.equal(after, layout.axes + 4)


@pytest.mark.parametrize("has_axes", [True, False])
def test_either_all_columns_of_a_cache_have_axes_or_none(trio: Trio, has_axes: bool) -> None:
    plan = fastskip.plan_of(trio.under(DENSE))
    cache = SkipCache(plan)
    codes = torch.full((2, 3), CODES[TokenClass.TEXT])
    positions = torch.arange(3).expand(2, -1)
    with_axes = TokenLayout(codes, positions, 0, plan.groups, axes=positions.expand(3, -1, -1))
    without = TokenLayout(codes, positions, 0, plan.groups)
    first, second = (with_axes, without) if has_axes else (without, with_axes)
    cache.grow(first, None)
    cache.commit(first)
    cache.commit(first)
    with pytest.raises(ValueError, match="axes: needed for all columns"):
        cache.commit(second)
    assert cache.columns == 6


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", POLICIES)
def test_padding_on_either_side(trio: Trio, name: str, use_cache: bool) -> None:
    """Each sequence goes on from its own last row, as it does alone."""
    for padding in ("left", "right"):
        batch = random_batch(trio.plain, 4, images=(2, 0, 1), padding=padding, extra_columns=2)
        model = trio.under(POLICIES[name])
        together = generate(model, batch, NEW, use_cache=use_cache)
        for index in range(batch.size):
            alone = generate(model, batch.alone(index), NEW, use_cache=use_cache)
            assert torch.equal(together[index], alone[0]), padding


def test_the_oracle_forgets_where_images_lay(trio: Trio) -> None:
    batches = [random_batch(trio.plain, 5, images=(images,)) for images in (2, 0)]
    with MaskedOracle(trio.plain, DENSE) as oracle:
        found = [oracle.greedy(**batch.inputs(), max_new_tokens=NEW).tokens for batch in batches]
    for batch, tokens in zip(batches, found, strict=True):
        assert torch.equal(tokens, generate(trio.plain, batch, NEW))


def test_alone_is_hugging_faces(trio: Trio) -> None:
    batch = random_batch(trio.plain, 5, images=(2,))
    given: list[dict[str, Any]] = [{}, {"assistant_model": trio.plain}, {"num_beams": 3}]
    if version.parse(transformers.__version__) >= version.parse("5.24"):  # 5.17 itself raises
        given.append({"prefill_chunk_size": 3})
    for options in given:
        expected = trio.plain.generate(
            **batch.inputs(), max_new_tokens=NEW, do_sample=False, **options
        )[:, batch.columns :]
        assert torch.equal(generate(trio.under(DENSE), batch, NEW, **options), expected), options


@torch.no_grad()
def test_forwards_of_the_users_own(trio: Trio) -> None:
    """A prompt, then two tokens, then one on the cache: as all at once."""
    model, batch = trio.under(IMAGE_FFN), random_batch(trio.plain, 6, images=(1, 2))
    given = batch.inputs()
    first = model(**given)
    new = torch.randint(3, 50, (2, 3), generator=torch.Generator().manual_seed(1))
    mask = torch.cat((given["attention_mask"], torch.ones_like(new)), dim=1)
    after, cache = [], first[CACHE_NAME]
    for start, end in ((0, 2), (2, 3)):
        seen = mask[:, : batch.columns + end]
        own = {"input_ids": new[:, start:end], "attention_mask": seen, CACHE_NAME: cache}
        after.append(model(**own).logits)
    types = torch.cat((given["mm_token_type_ids"], torch.zeros_like(new)), dim=1)
    whole = given | {
        "input_ids": torch.cat((given["input_ids"], new), dim=1),
        "attention_mask": mask,
        "mm_token_type_ids": types,
    }
    plain, truth = trio.expected(IMAGE_FFN, **whole)
    found = torch.cat((first.logits, *after), dim=1)
    assert_within_budget("logits", found, plain, truth, rows=mask.bool())


def _joined(first: Batch, answer: Tensor, second: Batch) -> dict[str, Tensor]:
    """Two turns of one conversation as one prompt."""
    one, two = first.inputs(), second.inputs()
    zeros = torch.zeros_like(answer)
    between = {"input_ids": answer, "attention_mask": zeros + 1, "mm_token_type_ids": zeros}
    found = {name: torch.cat((one[name], own, two[name]), 1) for name, own in between.items()}
    for name in ("pixel_values", "image_grid_thw"):
        found[name] = torch.cat((one[name], two[name]))
    return found


@torch.no_grad()
def test_a_second_turn_with_another_image(trio: Trio) -> None:
    first, second = (random_batch(trio.plain, seed, images=(1,)) for seed in (7, 8))
    model = trio.under(DENSE)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    turn = model.generate(**first.inputs(), **options)
    answer = turn.sequences[:, first.columns :]
    whole = _joined(first, answer, second)
    expected = trio.plain.generate(**whole, **options).sequences
    assert torch.equal(model.generate(**whole, **options).sequences, expected)
    # What comes new is given alone, with where it stands.
    cache, seen = turn[CACHE_NAME], turn[CACHE_NAME].columns
    axes, _ = trio.plain.model.get_rope_index(
        whole["input_ids"],
        **{n: whole[n] for n in ("mm_token_type_ids", "image_grid_thw", "attention_mask")},
    )
    new = second.inputs()
    ids = whole["input_ids"][:, seen:]
    logits = model(
        input_ids=ids,
        attention_mask=whole["attention_mask"],
        position_ids=axes[:, :, seen:],
        pixel_values=new["pixel_values"],
        image_grid_thw=new["image_grid_thw"],
        **{CACHE_NAME: cache},
    ).logits
    plain, truth = trio.expected(DENSE, **whole)
    assert_within_budget("logits", logits, plain[:, seen:], truth[:, seen:])


@pytest.mark.parametrize("images", [(1,), (2, 1)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_a_second_turn_of_text(trio: Trio, images: tuple[int, ...], has_mask: bool) -> None:
    """`generate` goes on from a kept cache; Hugging Face then says one position for all three."""
    first = random_batch(trio.plain, 7, images=images)
    more = torch.tensor([[5, 6, 7, 8]]).expand(len(images), -1)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    found = []
    for model in (trio.plain, trio.under(DENSE)):
        turn = model.generate(**first.inputs(), **options)
        ids = torch.cat((turn.sequences, more), dim=1)
        given: dict[str, Any] = {"input_ids": ids, CACHE_NAME: turn[CACHE_NAME]}
        if has_mask or len(images) > 1:
            mask = first.attention_mask
            given["attention_mask"] = pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        found.append(model.generate(**given, **options).sequences)
    assert torch.equal(*found)


@torch.no_grad()
def test_two_conversations_in_turn(trio: Trio) -> None:
    """Each goes on from its own cache, whatever the model saw in between."""
    first, other = (
        random_batch(trio.plain, 7, images=(1,)),
        random_batch(trio.plain, 9, images=(2, 1)),
    )
    model, more = trio.under(DENSE), torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    turn = model.generate(**first.inputs(), **options)
    cache, again = turn[CACHE_NAME], copy.deepcopy(turn[CACHE_NAME])
    ids = torch.cat((turn.sequences, more), dim=1)
    forward = {"input_ids": ids[:, cache.columns :], "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **{CACHE_NAME: copy.deepcopy(cache)}, **options).sequences
    logits = model(**forward, **{CACHE_NAME: copy.deepcopy(cache)}).logits
    model.generate(**other.inputs(), **options)
    assert torch.equal(model(**forward, **{CACHE_NAME: again}).logits, logits)
    model.generate(**other.inputs(), **options)
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, **options).sequences, expected)


@pytest.mark.parametrize("name", POLICIES)
def test_videos(trio: Trio, name: str) -> None:
    """Their rows are image rows; in Qwen2.5-VL a second takes more than one position."""
    kind, grid = trio.plain.config.model_type, (3, 4, 2)
    pixels = torch.randn(24, 3 * 2 * PATCH**2, generator=torch.Generator().manual_seed(3))
    own = [trio.plain.config.video_token_id] * (24 // 4)
    if kind == "qwen3_vl":  # whose frames stand apart, behind the time of each
        own = [token for frame in range(3) for token in (40 + frame, *own[:2])]
    ids = torch.tensor([[5, 6, *own, 7, 8, 9]])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == trio.plain.config.video_token_id).long(),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]),
    }
    if kind == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([5.0])  # so that time goes on furthest
    options = {"max_new_tokens": NEW, "do_sample": False}
    model = trio.under(POLICIES[name])
    if name == "dense":
        assert torch.equal(
            model.generate(**given, **options), trio.plain.generate(**given, **options)
        )
    plain, truth = trio.expected(POLICIES[name], **given)
    with torch.no_grad():
        found = model(**given).logits
    assert_within_budget("logits", found, plain, truth)


def test_images_turn_otherwise_than_text(trio: Trio) -> None:
    """Told to stand one after the other, image rows give other logits."""
    batch = random_batch(trio.plain, 9, images=(1,))
    model = trio.under(DENSE)
    with torch.no_grad():
        told = model(**batch.inputs(), position_ids=torch.arange(batch.columns)[None]).logits
        assert (model(**batch.inputs()).logits - told).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 4, 5), (3, 1, 4)])
def test_positions_of_other_shapes(trio: Trio, shape: tuple[int, ...]) -> None:
    ids = torch.randint(3, 50, (1, 5))
    with pytest.raises(ValueError, match=r"position_ids: .*needed: \[3, 1, 5\].*\[4, 1, 5\]"):
        trio.under(DENSE)(input_ids=ids, position_ids=torch.zeros(shape, dtype=torch.long))


def test_rows_that_leave(trio: Trio) -> None:
    """Under a removal the cache gives what computing all again does."""
    policy = fastskip.SkipPolicy.preset("fastv", after=1, ratio=0.5)
    batch = random_batch(trio.plain, 10, images=(2, 1))
    model = trio.under(policy.to_dict())
    with_cache = generate(model, batch, NEW)
    assert torch.equal(with_cache, generate(model, batch, NEW, use_cache=False))


def test_a_copy_and_a_policy_swap(trio: Trio) -> None:
    batch = random_batch(trio.plain, 11, images=(1, 1))
    model = copy.deepcopy(trio.under(IMAGE_FFN))
    before = generate(model, batch, NEW)
    fastskip.set_policy(model, DENSE)
    assert torch.equal(generate(model, batch, NEW), generate(trio.under(DENSE), batch, NEW))
    fastskip.set_policy(model, IMAGE_FFN)
    assert torch.equal(generate(model, batch, NEW), before)


@pytest.mark.parametrize("kind", BY_PATCHES)
def test_prompts_that_end_in_an_image(kind: Kind) -> None:
    """Their next row has three positions; steps on the device have one."""
    trio, device = (Trio(tiny_llava(kind), impl) for impl in ("reference", "torch"))
    batch = random_batch(trio.plain, 1, images=(1,))
    end = int((batch.token_classes == IMAGE).nonzero()[-1, 1]) + 1
    ending = replace(
        batch,
        input_ids=batch.input_ids[:, :end],
        attention_mask=batch.attention_mask[:, :end],
        token_classes=batch.token_classes[:, :end],
    )
    expected = trio.plain.generate(**ending.inputs(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(trio.prepared, ending, NEW), expected[:, end:])
    with pytest.raises(ValueError, match="ends in an image; allowed: prompts with text.*reference"):
        generate(device.prepared, ending, NEW)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
@pytest.mark.parametrize("kind", BY_PATCHES)
def test_images_next_to_each_other(kind: Kind, template: str | None) -> None:
    """Hugging Face tells them apart by what lies between them, and raises where nothing does."""
    processor, model = build_processor(kind, template), tiny_llava(kind, vocab=VOCAB)
    images = [image(8, 16), image(20, 9)]
    with torch.no_grad():
        model(**build_inputs(processor, "these: <image><image> say?", images))
    text = Renderer(processor).prompt((), "these: <image><image> say?", 2, "a question")
    with torch.no_grad():
        model(**processor(text=[text], images=[images], return_tensors="pt"))


@pytest.mark.parametrize("kind", BY_PATCHES)
def test_answers_are_judged_where_they_stand(kind: Kind) -> None:
    """A search embeds prompts and answers once, and feeds them with where they stand."""
    stock = tiny_llava(kind, vocab=VOCAB)
    items = [Item(f"what is {n}?", ("b",), (image(8, 8 + 8 * n),)) for n in range(2)]
    exam = Exam(items, build_processor(kind), batch_size=2, new_tokens=3)
    (batch,) = Calibrator(fastskip.apply_(copy.deepcopy(stock)), exam)._batches
    given = exam.inputs(0)
    told = stock.generate(**given, max_new_tokens=3, do_sample=False)[:, -3:]
    assert torch.equal(batch.answers, told)
    plain, truth = (_logs(model, given, told[:, :-1]) for model in (stock, truth_copy(stock)))
    assert_within_budget("log probabilities", batch.logs, plain, truth)


def _logs(model: Any, given: dict[str, Any], told: Tensor) -> Tensor:
    with MaskedOracle(model, DENSE) as oracle:
        return oracle.continuation(oracle.prompt(**given), told).log_softmax(-1)


@pytest.mark.parametrize("kind", BY_PATCHES)
def test_similarities_of_answers(kind: Kind) -> None:
    model = tiny_llava(kind)
    given = random_batch(model, 3, images=(1, 2)).inputs()
    found = similarities(model, [given], new_tokens=2)
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=2, do_sample=False)
        more = {name: pad(given[name], (0, 2), value=value) for name, value in LATER.items()}
        out = model(**given | more | {"input_ids": ids}, output_hidden_states=True)
    for each in found:
        if each.token_class is TokenClass.GENERATED and each.layer < 3:  # the last has a norm
            before, after = (out.hidden_states[each.layer + n][:, -2:] for n in (0, 1))
            cosine = cosine_similarity(before, after, dim=-1).mean()
            assert each.block == pytest.approx(float(cosine), abs=1e-5)
