"""The cache: what it holds, what it costs, how it grows, and that it never changes a result."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fastskip
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.slots import SEGMENT_SLOTS
from fastskip.ops.allocate import empty
from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget
from tests.models import tiny_llama, tiny_llava
from tests.policies import Policy, pair, policy_of, skip

POLICIES = {
    "dense": policy_of(),
    "project": policy_of(skip("1:3", ["image"], "attention", kv="project")),
    "reuse": policy_of(skip("1:3", ["image", "generated"], "block", kv="reuse")),
    "omit": policy_of(skip("0:2", ["image"], "attention", kv="omit")),
    "omit generated": policy_of(skip([1, 2], ["generated"], "attention", kv="omit")),
    "layer 0 empty": policy_of(skip([0], "all", "attention")),
    "layers 0 and 1 empty": policy_of(skip("0:2", "all", "block", kv="reuse")),
    "mixed": policy_of(
        skip([0], "all", "attention"),
        skip([1], ["image"], "block", kv="omit"),
        skip([2], ["image", "text"], "attention", kv="reuse"),
        skip([3], ["generated"], "attention", kv="reuse"),
    ),
    "pair": policy_of(skip([0], ["image"], "attention", kv="omit"), arrangements=(pair([[2, 3]]),)),
}


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, seed=1, images=(2, 0, 1))


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


@torch.no_grad()
def fill(model: Any, batch: Batch) -> SkipCache:
    """The cache of a prompt."""
    cache = model(**batch.inputs(), use_cache=True, logits_to_keep=1).past_key_values
    assert isinstance(cache, SkipCache)
    return cache


def full_mask(batch: Batch, new: int) -> Tensor:
    return torch.cat([batch.attention_mask, torch.ones(batch.size, new, dtype=torch.long)], dim=1)


@torch.no_grad()
def proceed(model: Any, batch: Batch, cache: SkipCache, tokens: Tensor, code: int) -> Tensor:
    """Logits of new rows of one class after what a cache holds."""
    seen = cache.get_seq_length()
    mask = full_mask(batch, seen - batch.columns + tokens.shape[1])
    logits: Tensor = model(
        input_ids=tokens,
        attention_mask=mask,
        past_key_values=cache,
        token_classes=torch.full_like(tokens, code),
    ).logits
    return logits


def whole(batch: Batch, tokens: Tensor, codes: Tensor | int) -> dict[str, Any]:
    """Inputs of the oracle for the prompt and new rows in one forward."""
    new = torch.full_like(tokens, codes) if isinstance(codes, int) else codes
    return batch.inputs() | {
        "input_ids": torch.cat([batch.input_ids, tokens], dim=1),
        "attention_mask": full_mask(batch, tokens.shape[1]),
        "token_classes": torch.cat([batch.token_classes, new], dim=1),
    }


def check_continuation(
    trio: Trio, policy: Policy, batch: Batch, actual: Tensor, tokens: Tensor, codes: Any
) -> None:
    eager, truth = (
        logits[:, -actual.shape[1] :]
        for logits in trio.expected(policy, **whole(batch, tokens, codes))
    )
    assert_within_budget("continued", actual, eager, truth)


def some_tokens(batch: Batch, count: int) -> Tensor:
    return torch.randint(1, 60, (batch.size, count), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("skipped", [[], [2], [0], [0, 1], [0, 1, 2, 3]])
def test_an_empty_layer_0_disturbs_nothing(trio: Trio, skipped: list[int]) -> None:
    """Hugging Face's own cache takes its length from layer 0, and gets this wrong."""
    policy = policy_of(*([skip(skipped, "all", "attention")] if skipped else []))
    batch = random_batch(trio.plain, seed=5, images=(1, 0))
    assert not batch.real.all()
    trio.check_greedy(policy, batch, 6)
    cache = fill(trio.under(policy), batch)
    for layer in range(4):
        assert cache.get_seq_length(layer) == batch.columns
        assert cache.get_mask_sizes(3, layer) == (batch.columns + 3, 0)


def test_a_layer_that_nobody_attends_in_holds_nothing(trio: Trio, batch: Batch) -> None:
    for kv in ("project", "reuse", "omit"):
        model = trio.under(policy_of(skip([0, 2], "all", "attention", kv=kv)))
        assert set(fill(model, batch).entries) == {1, 3}
    # What is skipped by the classes at hand is not skipped by every class.
    model = trio.under(policy_of(skip([0], ["image", "text"], "attention", kv="project")))
    assert set(fill(model, batch).entries) == {0, 1, 2, 3}
    model = trio.under(policy_of(skip([0], ["image", "text"], "attention", kv="omit")))
    cache = fill(model, batch)
    assert not any(keys.numel() for keys in cache.entries[0].keys) if 0 in cache.entries else True


def test_live_bytes_are_what_the_plan_predicts(trio: Trio, batch: Batch, policy: Policy) -> None:
    model = trio.under(policy)
    plan = fastskip.plan_of(model)
    counts = [
        [int((batch.token_classes[b][batch.real[b]] == c).sum()) for c in (0, 1)] for b in range(3)
    ]
    new = 5
    for generated in (0, new - 1):
        if generated:
            cache = model.generate(
                **batch.inputs(), max_new_tokens=new, do_sample=False, return_dict_in_generate=True
            ).past_key_values
        else:
            cache = fill(model, batch)
        predicted = sum(plan.kv_bytes(image, text, generated) for image, text in counts)
        assert cache.live_bytes() == predicted
        longest = max(sum(pair) for pair in counts) + generated
        # Every sequence gets the slots of the longest, and one more column may be reserved.
        entry = plan.shape.kv_entry_bytes
        assert cache.live_bytes() <= cache.allocated_bytes() <= 3 * (longest + 1) * 4 * entry
    assert plan.shape.kv_entry_bytes == 2 * 2 * 8 * 4


def test_allocation_of_a_growing_cache_is_bounded(trio: Trio) -> None:
    batch = random_batch(trio.plain, seed=1, images=(0, 0), text=(4, 4))
    model = trio.under(POLICIES["reuse"])
    entry = fastskip.plan_of(model).shape.kv_entry_bytes
    cache = fill(model, batch)
    assert cache.allocated_bytes() == cache.live_bytes()
    for _ in range(3):
        proceed(model, batch, cache, some_tokens(batch, 1), TEXT)
        spare = cache.allocated_bytes() - cache.live_bytes()
        assert 0 < spare < SEGMENT_SLOTS * entry * batch.size * 4


def addresses(cache: SkipCache) -> dict[int, list[int]]:
    return {
        layer: [buffer.data_ptr() for buffer in (*entries.keys, *entries.values)]
        for layer, entries in cache.entries.items()
    }


@pytest.mark.parametrize("name", ["dense", "reuse", "omit generated", "mixed"])
def test_growth_moves_nothing_and_changes_nothing(trio: Trio, name: str) -> None:
    """One row at a time without a reservation, past the end of a second segment."""
    policy = POLICIES[name]
    batch = random_batch(trio.plain, seed=6, images=(1, 0), text=(2, 4))
    model = trio.under(policy)
    cache = fill(model, batch)
    tokens = some_tokens(batch, SEGMENT_SLOTS + 20)
    codes = torch.tensor([TEXT, GENERATED, GENERATED]).repeat(60)[: tokens.shape[1]]
    first, logits, segments = addresses(cache), [], 1
    for column, code in enumerate(codes.tolist()):
        logits.append(proceed(model, batch, cache, tokens[:, column : column + 1], code))
        now = addresses(cache)
        for layer, entries in cache.entries.items():
            segments = max(segments, len(entries.keys))
            if layer in first:
                assert now[layer][0] == first[layer][0]
                assert now[layer][len(entries.keys)] == first[layer][len(first[layer]) // 2]
    if any(fastskip.plan_of(model).layers[layer].holding for layer in range(4)):
        assert segments >= 3
    check_continuation(
        trio, policy, batch, torch.cat(logits, dim=1), tokens, codes.expand_as(tokens)
    )


@pytest.mark.parametrize("code", [IMAGE, TEXT, GENERATED])
@pytest.mark.parametrize("width", [1, 4])
def test_rows_after_a_cache(
    trio: Trio, batch: Batch, policy: Policy, code: int, width: int
) -> None:
    model = trio.under(policy)
    tokens = some_tokens(batch, 2 * width)
    cache = fill(model, batch)
    parts = [proceed(model, batch, cache, part, code) for part in tokens.split(width, dim=1)]
    check_continuation(trio, policy, batch, torch.cat(parts, dim=1), tokens, code)


def test_one_column_of_several_classes(trio: Trio, batch: Batch, policy: Policy) -> None:
    model = trio.under(policy)
    tokens = some_tokens(batch, 2)
    codes = torch.tensor([[GENERATED, TEXT], [TEXT, IMAGE], [IMAGE, GENERATED]])
    cache = fill(model, batch)
    logits = []
    mask = full_mask(batch, 2)
    with torch.no_grad():
        for column in range(2):
            end = batch.columns + column + 1
            logits.append(
                model(
                    input_ids=tokens[:, column : column + 1],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                    token_classes=codes[:, column : column + 1],
                ).logits
            )
    check_continuation(trio, policy, batch, torch.cat(logits, dim=1), tokens, codes)


def test_crop(trio: Trio, batch: Batch, policy: Policy) -> None:
    model = trio.under(policy)
    tokens = some_tokens(batch, 4)
    cache, other = fill(model, batch), some_tokens(batch, 6)[:, :3]
    live = cache.live_bytes()
    proceed(model, batch, cache, other, GENERATED)
    cache.crop(-3)
    assert cache.get_seq_length() == batch.columns and cache.live_bytes() == live
    check_continuation(
        trio, policy, batch, proceed(model, batch, cache, tokens, TEXT), tokens, TEXT
    )
    cache.crop(batch.columns)
    actual = proceed(model, batch, cache, tokens[:, :1], GENERATED)
    check_continuation(trio, policy, batch, actual, tokens[:, :1], GENERATED)


def test_sequences_are_picked_and_repeated(trio: Trio, batch: Batch, policy: Policy) -> None:
    model = trio.under(policy)
    tokens = some_tokens(batch, 2)
    reference = proceed(model, batch, fill(model, batch), tokens, GENERATED)

    def follow(cache: SkipCache, index: list[int]) -> None:
        mask = full_mask(batch, 2)[index]
        with torch.no_grad():
            logits = model(
                input_ids=tokens[index],
                attention_mask=mask,
                past_key_values=cache,
                token_classes=torch.full_like(tokens[index], GENERATED),
            ).logits
        _, truth = trio.expected(policy, **whole(batch, tokens, GENERATED))
        assert_within_budget("picked", logits, reference[index], truth[index, -2:])

    cache = fill(model, batch)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    follow(cache, [2, 2, 0])
    cache = fill(model, batch)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    follow(cache, [0, 0, 1, 1, 2, 2])
    cache = fill(model, batch)
    cache.batch_select_indices(torch.tensor([1]))
    follow(cache, [1])


def test_an_emptied_cache_takes_another_batch(trio: Trio, batch: Batch) -> None:
    model = trio.under(POLICIES["mixed"])
    other = random_batch(trio.plain, seed=7, images=(1, 1, 0, 2, 0))
    for empty_it in (SkipCache.reset, lambda cache: cache.crop(-batch.columns)):
        cache = fill(model, batch)
        empty_it(cache)
        assert cache.get_seq_length() == 0 and cache.live_bytes() == 0
        with torch.no_grad():
            logits = model(**other.inputs(), past_key_values=cache).logits
        eager, truth = trio.expected(POLICIES["mixed"], **other.inputs())
        assert_within_budget("logits", logits, eager, truth, rows=other.real)
        assert cache.batch_size == 5


def test_a_failing_forward_leaves_the_cache_as_it_was(
    trio: Trio, batch: Batch, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trio.under(policy)
    cache, tokens = fill(model, batch), some_tokens(batch, 3)
    live = cache.live_bytes()
    last = model.model.language_model.layers[3]
    # Hooked layers are not merged, so this raises halfway through the stack.
    hook = last.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        proceed(model, batch, cache, tokens, TEXT)
    hook.remove()
    assert cache.get_seq_length() == batch.columns and cache.live_bytes() == live
    actual = proceed(model, batch, cache, tokens, GENERATED)
    check_continuation(trio, policy, batch, actual, tokens, GENERATED)


def test_wrong_caches_are_refused(trio: Trio, batch: Batch) -> None:
    model = trio.under(POLICIES["reuse"])
    cache, inputs = fill(model, batch), batch.inputs()
    next_mask = full_mask(batch, 1)
    new = {"input_ids": some_tokens(batch, 1), "attention_mask": next_mask}
    for options in ({"cache_implementation": "static"}, {"cache_implementation": "offloaded"}):
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(**inputs, max_new_tokens=2, **options)
    with pytest.raises(TypeError, match="past_key_values: got DynamicCache"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="past_key_values: got DynamicCache"):
        model(**inputs, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="holds 3 sequences"):
        model(input_ids=new["input_ids"][:2], past_key_values=cache)
    hides = next_mask.clone()
    hides[1, batch.columns - 1] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        model(**new | {"attention_mask": hides}, past_key_values=cache)
    with pytest.raises(TypeError, match="filled by the prepared model"):
        trio.plain(**new, past_key_values=cache)
    # None of this has changed the cache.
    assert cache.get_seq_length() == batch.columns
    trio.under(POLICIES["omit"])
    for call in (model, lambda **o: model.generate(**o, max_new_tokens=2)):
        with pytest.raises(ValueError, match="filled under another policy"):
            call(**new, past_key_values=cache)
    # The same plan, made again, is the same plan.
    trio.under(copy.deepcopy(POLICIES["reuse"]))
    with torch.no_grad():
        model(**new, past_key_values=cache)


def test_a_stranger_cannot_use_a_cache_of_another_depth(trio: Trio, batch: Batch) -> None:
    cache = fill(trio.under(policy_of()), batch)
    other = fastskip.apply_(tiny_llama(depth=2))
    with pytest.raises(ValueError, match="past_key_values"), torch.no_grad():
        other(input_ids=some_tokens(batch, 1), past_key_values=cache)


def test_poison_works() -> None:
    """The fixture that every test runs under fills fresh memory with NaN."""
    assert empty((2, 2), torch.float32, torch.device("cpu")).isnan().all()


def test_nothing_is_kept_unless_asked_for(trio: Trio, batch: Batch) -> None:
    model = trio.under(POLICIES["mixed"])
    with torch.no_grad():
        assert model(**batch.inputs(), use_cache=False).past_key_values is None
    out = model.generate(
        **batch.inputs(), max_new_tokens=2, use_cache=False, return_dict_in_generate=True
    )
    assert out.past_key_values is None
