"""Caches of layers in which routers leave rows without an entry."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.decoder.cache import SkipCache
from fastskip.generation.cache_name import CACHE_NAME
from tests.agreement import Trio, generate
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.routing.routed import check_generate, random, routed, similarity

HOLLOW = routed(
    random([1], "all", "block", rate=0.5, kv="omit"),
    random([3], ["text", "generated"], "attention", rate=0.4, kv="omit", seed=2),
)
LOOKING = routed(similarity("1:3", "all", "block", threshold=0.85, kv="omit"))
ENTRY = 2 * 2 * 8 * 4
"""Bytes of K and V of a row in one layer of the tiny model."""


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, images=(1, 0, 2), seed=9)


def turn(model: Any, inputs: dict[str, Any], cache: SkipCache | None = None) -> tuple[Tensor, Any]:
    """Logits of a forward, and the cache that it leaves."""
    with torch.no_grad():
        found = model(**inputs, **({} if cache is None else {CACHE_NAME: cache}))
    return found.logits, found[CACHE_NAME]


@pytest.mark.parametrize("new", (1, 70))
def test_entries_are_those_that_ran(trio: Trio, batch: Batch, new: int) -> None:
    model = fastskip.set_policy(trio.prepared, HOLLOW)
    options = {"max_new_tokens": new + 1, "do_sample": False, "eos_token_id": None}
    with fastskip.record_routing(model) as record:
        out = model.generate(**batch.inputs(), **options, return_dict_in_generate=True)
    cache: Any = out[CACHE_NAME]
    rows = batch.size * new + int(batch.real.sum())
    left_out = sum(
        int(record.skipped(layer, fastskip.Sublayer.ATTENTION).sum()) for layer in (1, 3)
    )
    assert left_out
    assert cache.live_bytes() == (4 * rows - left_out) * ENTRY
    held = cache.held(1).cpu()
    real = torch.cat((batch.real, torch.ones(batch.size, new, dtype=torch.bool)), dim=1)
    assert torch.equal(held, real & ~record.skipped(1, fastskip.Sublayer.ATTENTION))


@pytest.mark.parametrize("policy", (HOLLOW, LOOKING), ids=("random", "similarity"))
def test_turns_follow_on_a_kept_cache(trio: Trio, batch: Batch, policy: dict[str, Any]) -> None:
    """A prompt in two forwards is the prompt in one: text rows, so the classes are the same."""
    model = fastskip.set_policy(trio.prepared, policy)
    text = random_batch(trio.plain, images=(0, 0), seed=3)
    inputs = text.inputs()
    whole, _ = turn(model, inputs)
    for first in (1, text.columns // 2, text.columns - 1):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        _, cache = turn(model, {"input_ids": ids[:, :first], "attention_mask": mask[:, :first]})
        late, _ = turn(model, {"input_ids": ids[:, first:], "attention_mask": mask}, cache)
        real = text.real[:, first:]
        torch.testing.assert_close(late[real], whole[:, first:][real], rtol=1e-4, atol=1e-5)


def test_cropped_and_chosen_caches(trio: Trio, batch: Batch) -> None:
    """What is cropped never was; sequences may be kept, repeated and put in another order."""
    model = fastskip.set_policy(trio.prepared, HOLLOW)
    text = random_batch(trio.plain, images=(0, 0, 0), seed=3)
    ids, mask = text.input_ids, text.attention_mask
    expected, _ = turn(model, {"input_ids": ids, "attention_mask": mask})
    _, cache = turn(model, {"input_ids": ids, "attention_mask": mask})
    copied = copy.deepcopy(cache)
    cut = text.columns - 2
    for each in (cache, copied):
        each.crop(cut)
        late, _ = turn(model, {"input_ids": ids[:, cut:], "attention_mask": mask}, each)
        real = text.real[:, cut:]
        torch.testing.assert_close(late[real], expected[:, cut:][real], rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 0])
    cache.crop(cut)
    cache.reorder_cache(order)
    late, _ = turn(model, {"input_ids": ids[order, cut:], "attention_mask": mask[order]}, cache)
    real = text.real[order, cut:]
    torch.testing.assert_close(late[real], expected[order, cut:][real], rtol=1e-4, atol=1e-5)


def test_beams(trio: Trio, batch: Batch) -> None:
    """With the cache, whose sequences beams keep exchanging, as without."""
    model = fastskip.set_policy(trio.prepared, HOLLOW)
    one = random_batch(trio.plain, images=(0, 0), seed=4)
    beams = generate(model, one, 5, num_beams=3)
    assert torch.equal(generate(model, one, 5, num_beams=3, use_cache=False), beams)


def test_sampling_and_streams_go_on(trio: Trio, batch: Batch) -> None:
    model = fastskip.set_policy(trio.prepared, HOLLOW)
    seen: list[Tensor] = []

    class Stream:
        def put(self, tokens: Tensor) -> None:
            seen.append(tokens)

        def end(self) -> None:
            pass

    first = batch.alone(0)
    tokens = generate(model, first, 4, streamer=Stream())
    assert torch.equal(torch.cat(seen[1:]), tokens[0])
    expected, _ = check_generate(trio, HOLLOW, first)
    assert torch.equal(tokens, expected)
    torch.manual_seed(3)
    sampled = model.generate(**first.inputs(), max_new_tokens=4, do_sample=True)
    torch.manual_seed(3)
    again = model.generate(**first.inputs(), max_new_tokens=4, do_sample=True)
    assert torch.equal(sampled, again)
