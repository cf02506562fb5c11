"""What a cache holds and allocates, and how it grows."""

import pytest
import torch

import fastskip
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.slots import SEGMENT_SLOTS
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.ops import processor
from fastskip.ops.allocate import empty
from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.continuing import CACHE_POLICIES, Continued, some_tokens
from tests.models import tiny_llava
from tests.policies import policy_of, skip

DEPTH, SEQUENCES = 4, 3
ENTRY = 2 * 2 * 8 * 4
"""Bytes of K and V of one row: 2 heads of width 8 in fp32."""


@pytest.mark.reference
@pytest.mark.parametrize("kv", ["project", "reuse", "omit"])
def test_a_layer_that_nobody_attends_in_holds_nothing(trio: Trio, batch: Batch, kv: str) -> None:
    policy = policy_of(skip([0, 2], "all", "attention", kv=kv))
    assert set(Continued(trio, policy, batch).fill().entries) == {1, 3}


def test_every_class_counts_and_not_only_those_at_hand(trio: Trio, batch: Batch) -> None:
    prompt = ["image", "text"]
    for kv, rows in (("project", batch.real.sum()), ("omit", 0)):
        policy = policy_of(
            skip([1, 2, 3], "all", "attention"), skip([0], prompt, "attention", kv=kv)
        )
        assert Continued(trio, policy, batch).fill().live_bytes() == rows * ENTRY


@pytest.mark.reference
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_live_bytes_are_what_the_plan_predicts(
    trio: Trio, batch: Batch, name: str, new: int
) -> None:
    model = trio.under(CACHE_POLICIES[name])
    plan = fastskip.plan_of(model)
    cache: SkipCache = model.generate(
        **batch.inputs(), max_new_tokens=new, do_sample=False, return_dict_in_generate=True
    )[CACHE_NAME]
    # The last token is never fed back, so it has no entry.
    classes = [row[real] for row, real in zip(batch.token_classes, batch.real, strict=True)]
    counts = [[int((row == c).sum()) for c in (IMAGE, TEXT)] for row in classes]
    predicted = sum(plan.kv_bytes(image, text, new - 1) for image, text in counts)
    assert cache.live_bytes() == predicted
    # Every sequence has the slots of the longest, and the last token's may be reserved.
    slots = max(image + text for image, text in counts) + new
    assert predicted <= cache.allocated_bytes() <= SEQUENCES * DEPTH * slots * ENTRY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocation_is_bounded(dtype: torch.dtype) -> None:
    """Less than one segment a sequence and layer above what is live, for equal sequences."""
    model = fastskip.apply_(tiny_llava(dtype=dtype), CACHE_POLICIES["reuse"])
    batch = random_batch(model, seed=1, images=(0, 0), text=(4, 4))
    for new in (1, 20, 140):
        cache: SkipCache = model.generate(
            **batch.inputs(), max_new_tokens=new, do_sample=False, return_dict_in_generate=True
        )[CACHE_NAME]
        spare = cache.allocated_bytes() - cache.live_bytes()
        assert 0 <= spare < SEGMENT_SLOTS * ENTRY * dtype.itemsize // 4 * batch.size * DEPTH


def addresses(cache: SkipCache) -> dict[tuple[int, str, int], int]:
    """Where each segment of each layer lies."""
    return {
        (layer, name, segment): buffer.data_ptr()
        for layer, entries in cache.entries.items()
        for name, buffers in (("keys", entries.keys), ("values", entries.values))
        for segment, buffer in enumerate(buffers)
    }


@pytest.mark.reference
@pytest.mark.parametrize("name", ["dense", "reuse", "omit generated", "mixed"])
def test_growth_moves_nothing_and_changes_nothing(trio: Trio, name: str) -> None:
    """One row at a time without a reservation, into a third segment."""
    case = Continued(
        trio, CACHE_POLICIES[name], random_batch(trio.plain, seed=6, images=(1, 0), text=(2, 4))
    )
    cache = case.fill()
    assert cache.allocated_bytes() - cache.live_bytes() < SEGMENT_SLOTS * ENTRY
    tokens = some_tokens(case.batch, SEGMENT_SLOTS + 20)
    codes = torch.tensor([TEXT, GENERATED, GENERATED]).repeat(60)[: tokens.shape[1]]
    logits, before = [], addresses(cache)
    for column, code in enumerate(codes.tolist()):
        logits.append(case.proceed(cache, tokens[:, column : column + 1], code))
        after = addresses(cache)
        assert before.items() <= after.items()
        before = after
    assert max(segment for _, _, segment in before) == 2
    case.check(torch.cat(logits, dim=1), tokens, codes.expand_as(tokens))


def test_poison_works() -> None:
    """Every test runs with fresh memory that is NaN, so a slot read too early shows."""
    assert empty((2, 2), torch.float32, torch.device("cpu")).isnan().all()


@pytest.mark.reference
@pytest.mark.parametrize(
    ("dtype", "has_amx", "segments"),
    [("float32", False, 1), ("bfloat16", True, 1), ("bfloat16", False, 2)],
)
def test_answers_share_the_prompts_segment_where_that_saves_copies(
    batch: Batch, dtype: str, has_amx: bool, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in half precision copy what is not full; the fused kernel, taken with AMX, does
    not."""
    kind = getattr(torch, dtype)
    monkeypatch.setattr(processor, "has_amx", lambda dtype: has_amx and dtype is kind)
    model = fastskip.apply_(tiny_llava().to(kind))
    inputs = {
        name: value.to(kind) if value.is_floating_point() else value
        for name, value in batch.inputs().items()
    }
    cache: SkipCache = model.generate(
        **inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True
    )[CACHE_NAME]
    assert [len(table.segments) for table in cache.tables.values()] == [segments]
