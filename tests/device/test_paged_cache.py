"""The device cache behind a model: what it holds and allocates, and what it survives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.decoder.fused.layer import FusedBlock
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.pages import GROWTH_PAGES
from fastskip.decoder.fused.parts import Stream
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.ops.contracts import PAGE
from fastskip.plan.layer_plan import Hollow, Staged
from fastskip.policy import TokenClass
from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.continuing import CACHE_POLICIES, Continued, some_tokens
from tests.device.conftest import IMPL
from tests.models import tiny_llava
from tests.routing.routed import random, routed

ENTRY = 2 * 2 * 8 * 4
"""Bytes of K and V of one row of one layer: 2 heads of width 8 in fp32."""


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(), IMPL)


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, seed=1, images=(2, 0, 1))


@pytest.fixture
def case(trio: Trio, batch: Batch) -> Continued:
    return Continued(trio, CACHE_POLICIES["mixed"], batch)


def fill(case: Continued) -> PagedCache:
    cache = case.fill()
    assert isinstance(cache, PagedCache)
    return cache


def generate(model: Any, batch: Batch, new: int, **options: Any) -> Any:
    return model.generate(
        **{**batch.inputs(), **options},
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
    )


def classes(batch: Batch) -> list[list[int]]:
    """Image and text rows of each sequence."""
    rows = [row[real] for row, real in zip(batch.token_classes, batch.real, strict=True)]
    return [[int((row == code).sum()) for code in (IMAGE, TEXT)] for row in rows]


@pytest.mark.parametrize("new", [1, 2, 70])
@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_bytes(trio: Trio, batch: Batch, name: str, new: int) -> None:
    """Live ones are the plan's; allocated are those reserved and less than a page a sequence."""
    model = trio.under(CACHE_POLICIES[name])
    plan = fastskip.plan_of(model)
    cache: PagedCache = generate(model, batch, new)[CACHE_NAME]
    counts = classes(batch)
    live = sum(plan.kv_bytes(image, text, new - 1) for image, text in counts)
    assert cache.live_bytes() == live
    layers = [layer for layer in plan.layers if layer.holding]
    # The last token's entry may be reserved and is never written.
    spare = batch.size * len(layers) * (PAGE + 1) * ENTRY
    assert live <= cache.allocated_bytes() < live + spare
    assert set(cache.pools) == {Staged(layer.holding, 0) for layer in layers}
    assert {number for pool in cache.pools.values() for number in pool.layers} == {
        layer.index for layer in layers
    }


def addresses(cache: PagedCache) -> dict[tuple[object, int], int]:
    return {
        (holding, number): slab.data_ptr()
        for holding, pool in cache.pools.items()
        for number, slab in enumerate(pool.slabs)
    }


@pytest.mark.parametrize("name", ["dense", "reuse", "omit generated", "mixed"])
def test_growth_moves_nothing_and_changes_nothing(trio: Trio, name: str) -> None:
    """Rows without a reservation, over several pages."""
    small = random_batch(trio.plain, seed=6, images=(1, 0), text=(2, 4))
    case = Continued(trio, CACHE_POLICIES[name], small)
    cache = fill(case)
    layers = sum(len(pool.layers) for pool in cache.pools.values())
    assert cache.allocated_bytes() - cache.live_bytes() < 2 * layers * PAGE * ENTRY
    tokens = some_tokens(small, 2 * PAGE + (GROWTH_PAGES + 1) * PAGE)
    codes = torch.tensor([TEXT, GENERATED, GENERATED, IMAGE]).repeat(len(tokens[0]))
    codes = codes[: len(tokens[0])]
    logits, before = [], addresses(cache)
    widths = [50, 1, 1, 1, 5, 1, PAGE, 1, 1]
    widths.append(len(codes) - sum(widths))
    for part, own in zip(tokens.split(widths, dim=1), codes.split(widths), strict=True):
        logits.append(case.proceed(cache, part, own))
        after = addresses(cache)
        assert before.items() <= after.items()
        before = after
        spare = cache.allocated_bytes() - cache.live_bytes()
        assert 0 <= spare < 2 * layers * GROWTH_PAGES * PAGE * ENTRY
    assert max(number for _, number in before) >= 2
    case.check(torch.cat(logits, dim=1), tokens, codes.expand_as(tokens))


def test_a_copy_stands_alone(case: Continued) -> None:
    tokens = some_tokens(case.batch, 80)
    cache = fill(case)
    copied = copy.deepcopy(cache)
    assert copied.plan is cache.plan and copied.anchor is cache.anchor
    assert not set(addresses(cache).values()) & set(addresses(copied).values())
    others = case.proceed(copied, tokens + 1, TEXT)
    case.check(others, tokens + 1, TEXT)
    case.check(case.proceed(cache, tokens, GENERATED), tokens, GENERATED)
    # Another copy of the grown cache, which the first one's death leaves alone.
    again = copy.deepcopy(cache)
    del cache
    more = torch.cat((tokens, tokens[:, :3]), dim=1)
    case.check(case.proceed(again, tokens[:, :3], GENERATED), more, GENERATED)


def test_beams(case: Continued) -> None:
    """Sequences are repeated, reordered and dropped; each goes on as if it were alone."""
    cache, tokens = fill(case), some_tokens(case.batch, 73)
    case.proceed(cache, tokens[:, :70], GENERATED)  # two pages, and two slabs
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 0, 3]))
    assert cache.batch_size == 4
    assert cache.live_bytes() <= cache.allocated_bytes()
    sequences = [2, 0, 0, 1]
    logits = case.proceed(cache, tokens[sequences][:, 70:], GENERATED, sequences)
    case.check(logits, tokens, GENERATED, sequences)


def test_a_failing_forward_leaves_the_cache_as_it_was(
    case: Continued, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, cache = some_tokens(case.batch, 3), fill(case)
    columns, live = cache.get_seq_length(), cache.live_bytes()
    run = FusedBlock.run

    def fails_in_the_last_layer(block: FusedBlock, *arguments: Any) -> Stream:
        if block.plan.index == 3:
            raise ZeroDivisionError
        return run(block, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FusedBlock, "run", fails_in_the_last_layer)
        with pytest.raises(ZeroDivisionError):
            case.proceed(cache, tokens + 1, TEXT)
    assert cache.get_seq_length() == columns and cache.live_bytes() == live
    case.check(case.proceed(cache, tokens, GENERATED), tokens, GENERATED)


def out_of_memory(*args: object) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory(case: Continued, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward, and while decoding."""
    tokens, cache = some_tokens(case.batch, 80), fill(case)
    columns, live = cache.get_seq_length(), cache.live_bytes()
    model = case.model
    ids = torch.cat((case.batch.input_ids, tokens[:, :1]), dim=1)
    second = {"input_ids": ids, "attention_mask": case.mask(1), "do_sample": False}
    for new in (2, 300):  # steps allocate as well, but not for this cache
        model.generate(**second, **{CACHE_NAME: copy.deepcopy(cache)}, max_new_tokens=new)
    second[CACHE_NAME] = cache
    many = {"input_ids": tokens, "attention_mask": case.mask(80), CACHE_NAME: cache}
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("fastskip.decoder.fused.pages.empty", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="lower the batch size, max_new_tokens"):
            model(**many)
        assert cache.get_seq_length() == columns and cache.live_bytes() == live
        model.generate(**second, max_new_tokens=2)
        cache.crop(columns)
        with pytest.raises(torch.OutOfMemoryError, match="no memory for 0.00 GiB more"):
            model.generate(**second, max_new_tokens=300)
    # The second turn's prompt went in, and what a first page had room for.
    assert columns < cache.get_seq_length() < columns + PAGE
    cache.crop(columns)
    assert cache.live_bytes() == live
    case.check(case.proceed(cache, tokens, GENERATED), tokens, GENERATED)


def test_other_models_caches_are_refused(trio: Trio, batch: Batch) -> None:
    """Also after this one was moved: pages are of one dtype and device."""
    case = Continued(trio, CACHE_POLICIES["dense"], batch)
    cache, tokens = fill(case), some_tokens(batch, 1)
    given = {"input_ids": tokens, CACHE_NAME: cache}
    other = copy.deepcopy(case.model)
    moved = copy.deepcopy(case.model)
    with torch.no_grad():
        old = moved(**batch.inputs())[CACHE_NAME]
        moved.to(torch.bfloat16)
        for model, inputs in ((other, given), (moved, {**given, CACHE_NAME: old})):
            with pytest.raises(ValueError, match="filled by another model, or before this one"):
                model(**inputs)
    case.check(case.proceed(cache, tokens, TEXT), tokens, TEXT)


def test_the_plain_runtime_refuses_pages(trio: Trio, batch: Batch) -> None:
    case = Continued(trio, CACHE_POLICIES["dense"], batch)
    cache, tokens = fill(case), some_tokens(batch, 1)
    plain = fastskip.apply_(copy.deepcopy(trio.plain), case.policy, impl="reference")
    with torch.no_grad(), pytest.raises(ValueError, match="filled by impl='triton' or 'torch'"):
        plain(input_ids=tokens, **{CACHE_NAME: cache})
    case.check(case.proceed(cache, tokens, TEXT), tokens, TEXT)


def test_gradients_through_a_filled_cache_are_refused(case: Continued) -> None:
    cache, tokens = fill(case), some_tokens(case.batch, 1)
    with pytest.raises(ValueError, match="filled without gradients.*torch.no_grad"):
        case.model(input_ids=tokens, **{CACHE_NAME: cache})
    case.check(case.proceed(cache, tokens, TEXT), tokens, TEXT)


def test_reset_gives_pages_back(case: Continued) -> None:
    cache = fill(case)
    cache.reset()
    assert cache.allocated_bytes() == cache.live_bytes() == cache.get_seq_length() == 0


def test_hollow_layers_share_pages_and_count_apart(trio: Trio, batch: Batch) -> None:
    """Layers that may hold the same rows lie together, whoever leaves entries there."""
    routers = (
        random([1, 2], "all", "block", kv="omit", rate=0.5),
        random([3], ["image"], "attention", kv="omit", rate=0.5, seed=5),
    )
    model = fastskip.set_policy(trio.prepared, routed(*routers))
    cache: PagedCache = generate(model, batch, 6)[CACHE_NAME]
    everyone = frozenset({TokenClass.IMAGE, TokenClass.TEXT, TokenClass.GENERATED})
    assert {key: pool.layers for key, pool in cache.pools.items()} == {
        Staged(everyone, 0): (0,),
        Hollow(everyone): (1, 2, 3),
    }
    held = [cache.held(layer).sum(1).tolist() for layer in (1, 2, 3)]
    counts = [cache.device_counts[layer].tolist() for layer in (1, 2, 3)]
    assert counts == held and len({tuple(each) for each in counts}) == 3
    pool = cache.pools[Hollow(everyone)]
    for layer in (1, 2, 3):
        for sequence, count in enumerate(cache.device_counts[layer].tolist()):
            assert pool.keys(layer, sequence, count).isfinite().all()
    # One tensor has all counts, in copies too, and after sequences were chosen.
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(torch.tensor([2, 0, 0, 1, 2]))
    for own, sequences in ((cache, (0, 1, 2)), (copied, (2, 0, 0, 1, 2))):
        assert own.hollow_counts is not None
        for number, layer in enumerate((1, 2, 3)):
            expected = [counts[number][sequence] for sequence in sequences]
            assert own.device_counts[layer].tolist() == expected
            assert own.hollow_counts[number, : len(sequences)].tolist() == expected
        own.hollow_counts.add_(1)
        assert own.device_counts[2].tolist() == [counts[1][n] + 1 for n in sequences]
