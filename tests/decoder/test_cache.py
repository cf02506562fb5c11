"""The cache never changes a result, whatever it holds and whatever is done to it."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fastskip
from fastskip.decoder.cache import SkipCache
from fastskip.families import text_model_of
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from tests.agreement import Trio
from tests.batches import random_batch
from tests.budget import assert_within_budget
from tests.continuing import CACHE_POLICIES, Continued, some_tokens
from tests.models import tiny_llava
from tests.policies import policy_of, skip


@pytest.fixture(scope="module", params=["llava", "llava_opt"])
def trio(request: pytest.FixtureRequest) -> Trio:
    return Trio(tiny_llava(request.param))


@pytest.fixture(params=CACHE_POLICIES)
def case(trio: Trio, request: pytest.FixtureRequest) -> Continued:
    return named(trio, request.param)


def named(trio: Trio, name: str) -> Continued:
    return Continued(trio, CACHE_POLICIES[name], random_batch(trio.plain, seed=1, images=(2, 0, 1)))


@pytest.mark.parametrize("skipped", [[], [2], [0], [0, 1], [0, 1, 2, 3]])
def test_an_empty_layer_0_disturbs_nothing(trio: Trio, skipped: list[int]) -> None:
    """Hugging Face's own cache takes its length from layer 0, and gets this wrong."""
    policy = policy_of(*([skip(skipped, "all", "attention")] if skipped else []))
    batch = random_batch(trio.plain, seed=5, images=(1, 0))
    assert not batch.real.all()
    trio.check_greedy(policy, batch, 6)
    cache = Continued(trio, policy, batch).fill()
    for layer in range(4):
        assert cache.get_seq_length(layer) == batch.columns
        assert cache.get_mask_sizes(3, layer) == (batch.columns + 3, 0)


@pytest.mark.parametrize("code", [IMAGE, TEXT, GENERATED])
@pytest.mark.parametrize("width", [1, 4])
def test_rows_after_a_cache(case: Continued, code: int, width: int) -> None:
    tokens, cache = some_tokens(case.batch, 2 * width), case.fill()
    parts = [case.proceed(cache, part, code) for part in tokens.split(width, dim=1)]
    case.check(torch.cat(parts, dim=1), tokens, code)


def test_one_column_of_several_classes(case: Continued) -> None:
    tokens, cache = some_tokens(case.batch, 2), case.fill()
    codes = torch.tensor([[GENERATED, TEXT], [TEXT, IMAGE], [IMAGE, GENERATED]])
    parts = [case.proceed(cache, tokens[:, i : i + 1], codes[:, i : i + 1]) for i in range(2)]
    case.check(torch.cat(parts, dim=1), tokens, codes)


def test_crop(case: Continued) -> None:
    tokens, others = some_tokens(case.batch, 4), some_tokens(case.batch, 3) + 1
    cache = case.fill()
    columns, live = cache.get_seq_length(), cache.live_bytes()
    case.proceed(cache, others, GENERATED)
    cache.crop(-3)
    assert cache.get_seq_length() == columns and cache.live_bytes() == live
    case.check(case.proceed(cache, tokens, TEXT), tokens, TEXT)
    cache.crop(columns)
    case.check(case.proceed(cache, tokens[:, :1], GENERATED), tokens[:, :1], GENERATED)


def test_sequences_are_picked_and_repeated(case: Continued) -> None:
    tokens = some_tokens(case.batch, 2)
    changes: list[tuple[Any, list[int]]] = [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ]
    for change, sequences in changes:
        cache = case.fill()
        change(cache)
        assert cache.batch_size == len(sequences)
        logits = case.proceed(cache, tokens[sequences], GENERATED, sequences)
        case.check(logits, tokens, GENERATED, sequences)


@pytest.mark.parametrize("way", ["reset", "crop"])
def test_an_emptied_cache_takes_another_batch(trio: Trio, way: str) -> None:
    case = named(trio, "mixed")
    other = random_batch(trio.plain, seed=7, images=(1, 1, 0, 2, 0))
    cache = case.fill()
    if way == "reset":
        cache.reset()
    else:
        cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0 and cache.live_bytes() == 0
    with torch.no_grad():
        logits = case.model(**other.inputs(), **{CACHE_NAME: cache}).logits
    eager, truth = trio.expected(case.policy, **other.inputs())
    assert_within_budget("logits", logits, eager, truth, rows=other.real)
    assert cache.batch_size == 5


@pytest.mark.reference
def test_a_failing_forward_leaves_the_cache_as_it_was(case: Continued) -> None:
    tokens, cache = some_tokens(case.batch, 3), case.fill()
    columns, live = cache.get_seq_length(), cache.live_bytes()
    # Hooks are obeyed, so this one raises halfway through the stack.
    last = text_model_of(case.model).layers[3].self_attn.v_proj
    hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.proceed(cache, tokens + 1, TEXT)
    hook.remove()
    assert cache.get_seq_length() == columns and cache.live_bytes() == live
    case.check(case.proceed(cache, tokens, GENERATED), tokens, GENERATED)


def test_caches_of_others_are_refused(trio: Trio) -> None:
    case = named(trio, "reuse")
    model, inputs = case.model, case.batch.inputs()
    options = {"max_new_tokens": 2, "do_sample": False}
    for kind in ("static", "offloaded"):
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(**inputs, **options, cache_implementation=kind)
    with pytest.raises(TypeError, match=f"{CACHE_NAME}: got DynamicCache"):
        model.generate(**inputs, **options, **{CACHE_NAME: DynamicCache()})
    with pytest.raises(TypeError, match=f"{CACHE_NAME}: got DynamicCache"):
        model(**inputs, **{CACHE_NAME: DynamicCache()})


def test_a_cache_remembers_its_plan(trio: Trio) -> None:
    case = named(trio, "reuse")
    cache, tokens = case.fill(), some_tokens(case.batch, 1)
    new: dict[str, Any] = {"input_ids": tokens, CACHE_NAME: cache}
    new["attention_mask"] = case.mask(1)
    with pytest.raises(TypeError, match="filled by the prepared model"):
        trio.plain(**new)
    model = trio.under(CACHE_POLICIES["omit"])
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match="filled under another policy"):
            call(**new)
    with pytest.raises(ValueError, match=f"{CACHE_NAME}: .*another policy"):
        fastskip.apply_(tiny_llava(depth=2))(**new)
    # None of this has changed the cache, and the same policy read again is the same plan.
    again = Continued(trio, copy.deepcopy(case.policy), case.batch)
    case.check(again.proceed(cache, tokens, TEXT), tokens, TEXT)


def test_inputs_that_do_not_fit_a_cache(trio: Trio) -> None:
    case = named(trio, "mixed")
    cache, tokens = case.fill(), some_tokens(case.batch, 1)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 3 sequences, the input has 2"):
        case.model(input_ids=tokens[:2], **{CACHE_NAME: cache})
    hides = case.mask(1)
    hides[1, case.batch.columns - 1] = 0
    with pytest.raises(ValueError, match="attention_mask: changes which cached columns"):
        case.model(input_ids=tokens, attention_mask=hides, **{CACHE_NAME: cache})
    case.check(case.proceed(cache, tokens, TEXT), tokens, TEXT)


def test_nothing_is_kept_unless_asked_for(trio: Trio) -> None:
    case = named(trio, "mixed")
    inputs = case.batch.inputs()
    with torch.no_grad():
        assert getattr(case.model(**inputs, use_cache=False), CACHE_NAME) is None
        assert isinstance(case.model(**inputs)[CACHE_NAME], SkipCache)
    out = case.model.generate(
        **inputs, max_new_tokens=2, use_cache=False, return_dict_in_generate=True
    )
    assert getattr(out, CACHE_NAME) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "reuse", "mixed"])
def test_many_rows(name: str, dtype: torch.dtype) -> None:
    """More rows than attention takes in one block: in the prompt, after a cache, and mixed."""
    long = Trio(tiny_llava(image_tokens=64, dtype=dtype))
    batch = random_batch(long.plain, seed=1, images=(2, 0, 1))
    case = Continued(long, CACHE_POLICIES[name], batch)
    long.check_forward(case.policy, batch)
    tokens, cache = some_tokens(batch, 100), case.fill()
    codes = torch.tensor([TEXT, GENERATED, IMAGE, TEXT]).repeat(25)
    parts = [
        case.proceed(cache, tokens[:, part], codes[part].expand(3, -1))
        for part in (slice(0, 70), slice(70, 71), slice(71, 100))
    ]
    case.check(torch.cat(parts, dim=1), tokens, codes.expand(3, -1))
