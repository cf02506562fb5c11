"""Rows that leave: whatever the rule, what ran is the masked dense computation."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastskip
from fastskip.decoder.cache import SkipCache
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.policy import Sublayer
from fastskip.verification.cells import IMAGE
from tests.agreement import Trio, generate
from tests.batches import Batch, random_batch
from tests.models import Kind, tiny_llava
from tests.policies import pair, parallel, skip
from tests.removals.removing import (
    attention_of,
    kept_by,
    last_prompt_columns,
    removal,
    removing,
)
from tests.routing.routed import check_forward, check_generate

DEPTH = 4
RANKINGS = ("attention", "next_attention", "random", "spacing")


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batches(trio: Trio) -> list[Batch]:
    return [
        random_batch(trio.plain, images=images, seed=seed)
        for seed, images in enumerate([(1,), (0, 2), (2, 0, 1)])
    ]


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    after = sorted(draw(st.sets(st.integers(0, DEPTH - 2), min_size=1)))
    removals = [
        removal(n, draw(st.sampled_from(RANKINGS)), draw(st.sampled_from([0.0, 0.3, 0.5, 0.9])))
        for n in after
    ]
    kv: str = draw(st.sampled_from(["project", "reuse", "omit"]))
    tokens = draw(st.sampled_from([["image"], ["text"], ["generated"], ["image", "generated"]]))
    layers = draw(st.lists(st.sampled_from(range(DEPTH)), max_size=2, unique=True))
    part: str = draw(st.sampled_from(["ffn", "attention", "block"]))
    left = {} if part == "ffn" else {"kv": kv}
    rules = [skip(layers, tokens, part, **left)] if layers else []
    return removing(*removals, rules=rules)


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(policy=policies(), number=st.integers(0, 2))
def test_result_is_the_masked_one(
    trio: Trio, batches: list[Batch], policy: dict[str, Any], number: int
) -> None:
    try:
        fastskip.set_policy(trio.prepared, policy)
    except fastskip.PolicyError as error:
        assert error.field.endswith("keep.by")  # nobody attends where the rule looks
        return
    except fastskip.UnsupportedModelError as error:
        assert "kv reuse" in str(error)  # on the device, over a removal
        return
    check_forward(trio, policy, batches[number])
    check_generate(trio, policy, batches[number], new=3)


@pytest.mark.parametrize(
    "arrangement", [parallel(":"), parallel([1, 2], "shared"), pair([[2, 3]]), pair([[0, 1]])]
)
def test_arrangements(trio: Trio, batches: list[Batch], arrangement: dict[str, Any]) -> None:
    by = "spacing" if arrangement["kind"] == "pair" else "attention"
    policy = removing(removal(1, by), arrangements=[arrangement])
    for batch in batches:
        check_forward(trio, policy, batch)
        check_generate(trio, policy, batch)


@pytest.mark.parametrize("by", RANKINGS)
def test_who_leaves_stays_away(trio: Trio, batches: list[Batch], by: str) -> None:
    batch = batches[2]
    policy = removing(removal(0, by), removal(2, by))
    _, masks = check_generate(trio, policy, batch)
    is_image = batch.token_classes == IMAGE
    last = last_prompt_columns(batch.token_classes, batch.real)
    before = torch.zeros_like(is_image)
    for layer, rounds in ((1, 1), (2, 1), (3, 2)):
        for sublayer in ("attention", "ffn"):
            gone = masks[layer, sublayer][:, : batch.columns]
            assert not masks[layer, sublayer][:, batch.columns :].any()
            assert torch.all(is_image[gone]) and torch.all(gone[before])
            for sequence, row in enumerate(is_image):
                candidates = int(row.sum()) - int(row[last[sequence]])
                left = candidates // 2 if rounds == 1 else candidates // 2 // 2
                assert int(gone[sequence].sum()) == candidates - left
        before = gone
    assert (0, "attention") not in masks


@pytest.mark.parametrize("by", RANKINGS)
def test_sequences_do_not_influence_each_other(trio: Trio, batches: list[Batch], by: str) -> None:
    policy, batch = removing(removal(1, by)), batches[2]
    together, masks = check_generate(trio, policy, batch)
    for index in range(batch.size):
        alone, own = check_generate(trio, policy, batch.alone(index))
        assert torch.equal(alone[0], together[index])
        real = torch.cat((batch.real[index], torch.ones(alone.shape[1] - 1, dtype=torch.bool)))
        for key, mask in own.items():
            assert torch.equal(mask[0], masks[key][index, real]), key


@pytest.mark.parametrize("by", RANKINGS)
def test_cached_is_recomputed(trio: Trio, batches: list[Batch], by: str) -> None:
    model = trio.under(removing(removal(0, by, 0.6), removal(2, by, 0.5)))
    for batch in batches:
        cached = generate(model, batch)
        assert torch.equal(generate(model, batch, use_cache=False), cached)


def test_nobody_stays_as_in_a_withdrawal(trio: Trio, batches: list[Batch]) -> None:
    withdrawn = removing(rules=[skip("2:", ["image"], "block", kv="omit")])
    for batch in batches:
        expected = generate(trio.under(withdrawn), batch)
        # a withdrawal takes a prompt's last row too
        alike = batch.token_classes[:, -1] != IMAGE
        assert alike.any()
        for by in RANKINGS:
            found = generate(trio.under(removing(removal(1, by, 0.0))), batch)
            assert torch.equal(found[alike], expected[alike])


def _left_by(trio: Trio, policy: dict[str, Any], batch: Batch, layer: int) -> Tensor:
    model = trio.under(policy)
    with torch.no_grad(), fastskip.record_routing(model) as record:
        model(**batch.inputs())
    gone = record.skipped(layer, Sublayer.FFN)
    last = last_prompt_columns(batch.token_classes, batch.real)
    is_candidate = (batch.token_classes == IMAGE) & batch.real
    is_candidate[torch.arange(batch.size), torch.tensor(last)] = False
    return is_candidate & ~gone


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_attention_is_fastv(trio: Trio, batches: list[Batch], ratio: float) -> None:
    """FastV: after layer K - 1, by what its attention, the mean over its heads, gave each image row
    in the last row of the prompt; positions stay as they were."""
    for batch in batches:
        weights = attention_of(trio.plain, batch, layer=1)
        last = torch.tensor(last_prompt_columns(batch.token_classes, batch.real))
        scores = weights[torch.arange(batch.size), last]
        stay = kept_by(scores, batch, ratio)
        policy = fastskip.SkipPolicy.preset("fastv", after=1, ratio=ratio).to_dict()
        assert torch.equal(_left_by(trio, policy, batch, layer=2), stay)


@pytest.mark.parametrize("kind", ["llava", "internvl_qwen3"])
def test_next_attention_is_pyramid_drop(kind: Kind) -> None:
    """PyramidDrop, first stage: the projections of the layer to come, on what the layer before it
    gave. In the dense model that is the attention of that layer."""
    trio = Trio(tiny_llava(kind))
    for images in ((1,), (0, 2), (2, 0, 1)):
        batch = random_batch(trio.plain, images=images)
        weights = attention_of(trio.plain, batch, layer=2)
        last = torch.tensor(last_prompt_columns(batch.token_classes, batch.real))
        stay = kept_by(weights[torch.arange(batch.size), last], batch, 0.5)
        policy = fastskip.SkipPolicy.preset("pyramid_drop", stages=[1], ratio=0.5).to_dict()
        assert torch.equal(_left_by(trio, policy, batch, layer=2), stay)


def test_random_depends_on_the_seed(trio: Trio, batches: list[Batch]) -> None:
    batch = batches[2]
    seeds = [removing(removal(1, "random", seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (_left_by(trio, policy, batch, layer=2) for policy in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_cache_holds_what_the_plan_says(trio: Trio) -> None:
    batch = random_batch(trio.plain, images=(2,), seed=5)
    policy = removing(removal(0, "attention", 0.6), removal(2, "random", 0.3))
    model = trio.under(policy)
    with torch.no_grad():
        cache = model(**batch.inputs())[CACHE_NAME]
    assert isinstance(cache, SkipCache)
    assert cache.get_seq_length() == batch.columns
    n_image = int((batch.token_classes == IMAGE).sum())
    n_text = int(batch.real.sum()) - n_image
    assert cache.live_bytes() == fastskip.plan_of(model).kv_bytes(n_image, n_text)
    # cropped to before the image and fed again, the same rows leave again
    expected = [tensor.clone() for tensor in (cache.seen.gone, cache.seen.codes)]
    cache.crop(-batch.columns)
    assert cache.live_bytes() == 0
    with torch.no_grad():
        model(**batch.inputs(), **{CACHE_NAME: cache})
    found = cache.seen.gone, cache.seen.codes
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("by", ["attention", "next_attention"])
def test_beams_and_a_second_turn(trio: Trio, batches: list[Batch], by: str) -> None:
    model, batch = trio.under(removing(removal(0, by))), batches[0]
    beams = generate(model, batch, num_beams=2)
    assert torch.equal(generate(model, batch, num_beams=2, use_cache=False), beams)
    # A second image on a kept cache is chosen from alone.
    with torch.no_grad(), fastskip.record_routing(model) as record:
        cache = model(**batch.inputs())[CACHE_NAME]
        again = torch.cat((batch.attention_mask, batch.attention_mask), dim=1)
        model(**batch.inputs() | {"attention_mask": again, CACHE_NAME: cache})
    first, second = (each.skipped[1, Sublayer.FFN] for each in record.forwards)
    assert first.sum() == second.sum() > 0


@pytest.mark.parametrize("by", RANKINGS)
def test_gradients_are_those_of_the_same_rows(trio: Trio, batches: list[Batch], by: str) -> None:
    batch = batches[2]
    model = trio.under(removing(removal(0, by), removal(2, by)))
    with torch.no_grad():
        expected = model(**batch.inputs()).logits
    model.requires_grad_(True)
    try:
        out = model(**batch.inputs()).logits
        torch.testing.assert_close(out[batch.real], expected[batch.real])
        out[batch.real].square().mean().backward()
        weights = [layer.mlp.down_proj.weight.grad for layer in model.get_decoder().layers]
        assert all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in weights)
    finally:
        model.requires_grad_(False)
        model.zero_grad()


def test_hidden_states_of_rows_that_left_stay_as_they_left(
    trio: Trio, batches: list[Batch]
) -> None:
    batch = batches[2]
    model = trio.under(removing(removal(1, "attention")))
    with torch.no_grad(), fastskip.record_routing(model) as record:
        states = model(**batch.inputs(), output_hidden_states=True).hidden_states
    gone = record.skipped(2, Sublayer.FFN)
    assert gone.any()
    assert torch.equal(states[2][gone], states[3][gone])
    stayed = batch.real & ~gone
    assert not torch.equal(states[2][stayed], states[3][stayed])
