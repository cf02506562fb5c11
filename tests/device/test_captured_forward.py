"""Prompts through captured forwards, on interpreted kernels, against launches one by one.

Without CUDA a capture is the work itself on the same fixed memory, so what is shown here is that
the memory says all that a forward depends on.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fastskip
from fastskip.decoder.fused.captured_forward import (
    KEPT,
    CapturedForward,
    CapturedForwards,
    ForwardShape,
)
from fastskip.decoder.fused.lru import OFTEN
from fastskip.decoder.fused.sizes import rounded_rows
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.kernels import tuning
from fastskip.ops.allocate import poisoned
from fastskip.ops.bodies import Choose, CountedBody, HostBodies
from fastskip.ops.routes import Chosen
from fastskip.profiling import ranges
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.device.interpreted import STREAM
from tests.models import tiny_llava
from tests.policies import MIXED, Policy, pair, parallel, policy_of, skip
from tests.routing.routed import check_generate, random, routed, similarity

RULES_AND_PAIR: Policy = policy_of(
    skip([1], ["image"], "block", kv="omit"),
    skip([1], ["text"], "attention", kv="reuse"),
    arrangements=(pair([[2, 3]]),),
)
SWITCHED: dict[str, Policy] = {
    "block, omit": routed(random([0, 2, 3], "all", "block", kv="omit")),
    "block, project, beside a rule": routed(
        random([0, 2, 3], "all", "block", kv="project"), rules=[skip([1], ["image"], "ffn")]
    ),
    "block, reuse": routed(random("1:", "all", "block", kv="reuse")),
    "attention, omit": routed(random(":", "all", "attention", kv="omit")),
    "attention, reuse": routed(random("1:", "all", "attention", kv="reuse")),
    "ffn, in its layer's middle": routed(similarity("1:", "all", "ffn", threshold=0.5)),
    "both apart": routed(
        random(":", "all", "attention", kv="project"), random(":", "all", "ffn", seed=3)
    ),
    "only image rows": routed(random(":", ["image"], "block", kv="omit")),
    "nobody skips": routed(random(":", "all", "block", kv="omit", rate=0.0)),
    "all skip": routed(random("1:3", "all", "block", kv="omit", rate=1.0)),
    "parallel, one flag": routed(
        random(":", "all", "block", kv="omit"), arrangements=(parallel(":"),)
    ),
    "parallel, one flag, projected": routed(
        random(":", "all", "block", kv="project"), arrangements=(parallel(":", "shared"),)
    ),
    "parallel, two flags": routed(random(":", "all", "ffn"), arrangements=(parallel(":"),)),
}
ROUTED: dict[str, Policy] = {
    "omit beside a rule": routed(
        random([0, 3], "all", "block", kv="omit"), rules=[skip([1], ["image"], "ffn")]
    ),
    "parallel": routed(
        random([1], "all", "ffn"),
        random([1, 2], "all", "attention", kv="omit", seed=7, group="batch", agree="any"),
        arrangements=(parallel(":"),),
    ),
}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_llava(heads=2, kv_heads=1, head_dim=16, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def trio(plain: PreTrainedModel) -> Trio:
    return Trio(plain, impl="triton")


@pytest.fixture(scope="module")
def batches(plain: PreTrainedModel) -> list[Batch]:
    """Prompts of different lengths, padding and image places that share a shape."""
    left = [random_batch(plain, seed, images=(1, 1), text=(5, 7)) for seed in (3, 9)]
    return [*left, random_batch(plain, 8, images=(1, 1), text=(5, 7), padding="right")]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape is captured when it is first seen."""
    monkeypatch.setattr(CapturedForwards, "pays", lambda *_: True)


@pytest.fixture(autouse=True)
def small_programs() -> Iterator[None]:
    with tuning.table(STREAM), poisoned():
        yield


def captured_of(model: Any) -> CapturedForwards:
    found: CapturedForwards = model._fastskip.fused_decoder.captured
    return found


def test_one_capture_serves_other_prompts(trio: Trio, batches: list[Batch]) -> None:
    """The first is run launch by launch, the second captured, the third replayed."""
    model = trio.under(RULES_AND_PAIR)
    for number, (batch, new) in enumerate(zip(batches, (1, 1, 2), strict=True)):
        assert torch.equal(
            generate(model, batch, new), greedy(trio.plain, RULES_AND_PAIR, batch, new)
        )
        assert len(captured_of(model)) == min(number, 1)


def test_rows_in_time_height_and_width(at_once: None) -> None:
    """One capture serves images that lie otherwise: what rows turn by is sent anew."""
    trio = Trio(tiny_llava("qwen2_5_vl", heads=2, kv_heads=1), impl="triton")
    first = random_batch(trio.plain, 1, images=(2, 1))
    lying = tuple((pixels, (size[1], size[0])) for pixels, size in first.images)
    assert any(size[0] != size[1] for _, size in lying)
    check_one_capture(trio, first, replace(first, images=lying))


def test_features_behind_the_first_layers(at_once: None) -> None:
    """One capture serves images that add others."""
    trio = Trio(tiny_llava("qwen3_vl", heads=2, kv_heads=1), impl="triton")
    first = random_batch(trio.plain, 1, images=(2, 1))
    others = tuple((-pixels, size) for pixels, size in first.images)
    check_one_capture(trio, first, replace(first, images=others))


def check_one_capture(trio: Trio, first: Batch, other: Batch) -> None:
    """It serves both prompts, which say other things."""
    model = trio.under(RULES_AND_PAIR)
    for batch in (first, other, first):
        assert torch.equal(generate(model, batch, 2), greedy(trio.plain, RULES_AND_PAIR, batch, 2))
    assert len(captured_of(model)) == 1
    scores = [scores_of(model, batch)[0] for batch in (first, other)]
    assert (scores[0] - scores[1]).abs().max() > 1e-2


def scores_of(model: Any, batch: Batch) -> tuple[Tensor, Any]:
    """Logits of a few steps, and what was decided."""
    with fastskip.record_routing(model) as record:
        out = model.generate(
            **batch.inputs(),
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=None,
        )
    return torch.stack(out.logits, dim=1), record.all_skipped()


@pytest.mark.parametrize("name", ROUTED)
def test_decisions(name: str, trio: Trio, batches: list[Batch], at_once: None) -> None:
    """Of a prompt that another one's capture serves."""
    first, other = batches[:2]
    check_generate(trio, ROUTED[name], first, new=2)
    model = trio.prepared
    (forward,) = captured_of(model).values()
    scores, masks = scores_of(model, other)
    assert list(captured_of(model).values()) == [forward]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CapturedForwards, "pays", lambda *_: False)
        model = trio.under(ROUTED[name])
        expected, expected_masks = scores_of(model, other)
    torch.testing.assert_close(scores, expected)
    assert masks.keys() == expected_masks.keys()
    assert all(torch.equal(masks[key], expected_masks[key]) for key in masks)
    assert any(mask.any() for mask in masks.values())


class Counting(HostBodies):
    """Notes up to how many rows each body was for."""

    def __init__(self) -> None:
        self.bounds: list[int | None] = []

    def run_counted(self, runs: Tensor, choose: Choose, body: CountedBody) -> None:
        def noted(chosen: Chosen) -> None:
            self.bounds.append(chosen.bound)
            body(chosen)

        super().run_counted(runs, choose, noted)


@pytest.fixture
def switched(trio: Trio, at_once: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """Captured prompts go by bodies of 4, 8, 12, ... rows."""
    made = Counting()
    monkeypatch.setattr("fastskip.decoder.fused.kept_graphs.bodies_on", lambda device: made)
    monkeypatch.setattr("fastskip.ops.bodies.BOUNDS", 4)
    monkeypatch.setattr("fastskip.ops.compiled.FEW_CHOSEN", 4)
    captured = captured_of(trio.prepared)
    captured.switches = True
    yield made
    captured_of(trio.prepared).switches = None


@pytest.mark.parametrize("name", SWITCHED)
def test_bodies_for_numbers_of_rows(
    name: str, trio: Trio, batches: list[Batch], switched: Counting
) -> None:
    """Against the oracle, with the decisions read back."""
    check_generate(trio, SWITCHED[name], batches[1], new=2)
    bounds = switched.bounds
    (shape,) = (key for key, _ in captured_of(trio.prepared).items())
    assert all(bound is not None and bound % 4 == 0 for bound in bounds)
    if name == "parallel, two flags":  # their launches are shared
        assert not bounds
    elif name == "nobody skips":
        assert len(bounds) == 3  # the last layer narrows
    elif name == "all skip":
        assert not bounds
    else:
        assert min(filter(None, bounds)) < shape.bounds[-1]


def test_learned_positions_and_biases_in_bodies(
    switched: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that do not turn are put where their rows lie, too."""
    trio = Trio(tiny_llava("llava_opt", depth=2), impl="triton")
    batch = random_batch(trio.plain, 3, images=(1, 1), text=(5, 7))
    monkeypatch.setattr(captured_of(trio.prepared), "switches", True)
    check_generate(trio, routed(random(":", "all", "block", kv="omit")), batch, new=2)
    assert switched.bounds


def test_every_run_of_a_capture_begins_anew(
    trio: Trio, batches: list[Batch], at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it records, a capture on CUDA runs the work: entries must not move on meanwhile."""
    slots: list[Tensor] = []

    def capture(work: Any, device: torch.device, pool: Any) -> Any:
        for _ in range(3):
            work()
            slots.append(torch.stack(list(work.__self__._counts.values())))
        return work

    monkeypatch.setattr("fastskip.decoder.fused.captured_forward.capture", capture)
    generate(trio.under(ROUTED["omit beside a rule"]), batches[0], 1)
    assert len(slots) == 3 and bool((slots[0] > 0).any())
    assert torch.equal(slots[0], slots[1]) and torch.equal(slots[0], slots[2])


def test_without_memory_for_a_graph_a_prompt_is_launched(
    trio: Trio, batches: list[Batch], at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has run without one before. What the capture left in the cache does not matter."""

    def capture(work: Any, device: torch.device, pool: Any) -> Any:
        work()
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("fastskip.decoder.fused.captured_forward.capture", capture)
    check_generate(trio, ROUTED["omit beside a rule"], batches[0], new=2)
    assert len(captured_of(trio.prepared)) == 0


def test_learned_positions(at_once: None) -> None:
    trio = Trio(tiny_llava("llava_opt", depth=2), impl="triton")
    policy = policy_of(skip([1], ["image"], "block", kv="omit"))
    model = trio.under(policy)
    for seed, new in ((3, 1), (8, 2)):
        batch = random_batch(trio.plain, seed, images=(1, 1), text=(5, 7))
        assert torch.equal(generate(model, batch, new), greedy(trio.plain, policy, batch, new))
    assert len(captured_of(model)) == 1


def test_every_row_and_later_turns(trio: Trio, batches: list[Batch], at_once: None) -> None:
    """Logits of all columns; and a second forward on a cache that holds the first."""
    trio.check_forward(MIXED["each class its own rule"], batches[1])
    model = trio.under(policy_of(skip([1], "all", "block", kv="omit")))
    ids = batches[0].input_ids[:, -6:].clamp(max=50)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        rest = model(input_ids=ids[:, 4:], **{CACHE_NAME: first[CACHE_NAME]}).logits
    assert len(captured_of(model)) == 1, "one for all three"
    torch.testing.assert_close(torch.cat((first.logits, rest), dim=1), whole)


def test_what_is_not_captured(trio: Trio, batches: list[Batch], at_once: None) -> None:
    model = trio.under(policy_of())
    generate(model, batches[0], 1)
    (forward,) = captured_of(model).values()
    forward._replay = pytest.fail
    with torch.no_grad():
        model(**batches[0].inputs(), output_hidden_states=True)
        with ranges():
            generate(model, batches[0], 1)
        with pytest.raises(pytest.fail.Exception):
            generate(model, batches[0], 1)
    assert len(captured_of(model)) == 1


def test_few_are_kept() -> None:
    captured = CapturedForwards()
    shapes = [ForwardShape(1, (0, rows), None, None, 1, 64) for rows in range(KEPT + 1)]
    forwards = [object() for _ in shapes]
    captured.renew("version")
    for shape, forward in zip(shapes, forwards, strict=True):
        assert captured.get(shape) is None
        times = 1
        while not captured.pays(shape):
            times += 1
        assert times == (2 if shape is not shapes[-1] else OFTEN)
        build = partial(lambda made, pool: made, forward)
        assert captured.make(shape, torch.device("cpu"), build) is forward  # type: ignore[arg-type]
        assert captured.get(shape) is forward
    captured.renew("version")
    assert captured.get(shapes[0]) is None
    assert captured.get(shapes[-1]) is forwards[-1]
    captured.renew("another version")
    assert captured.get(shapes[-1]) is None
    assert not captured.pays(shapes[-1])


def test_rounding() -> None:
    counts = (0, 1, 16, 17, 64, 576, 577)
    assert list(map(rounded_rows, counts)) == [0, 16, 16, 32, 64, 576, 608]
    for count in range(1, 3000):
        assert count <= rounded_rows(count) <= max(count + 15, count * 17 // 16)
        assert rounded_rows(rounded_rows(count)) == rounded_rows(count)


@pytest.mark.parametrize("begins_inside", [True, False])
def test_inside_of_inference_mode_and_outside(
    begins_inside: bool, trio: Trio, batches: list[Batch], at_once: None
) -> None:
    """What one of them captured serves the other: entries omitted by decisions, too."""
    model = trio.under(routed(random([0, 3], "all", "block", kv="omit")))
    found = []
    for is_inside in (begins_inside, not begins_inside):
        with torch.inference_mode(is_inside):
            found.append(generate(model, batches[0], 2))
    assert len(captured_of(model)) == 1 and torch.equal(*found)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}], ids=str)
def test_loops_of_whole_forwards(
    options: dict[str, Any], at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams, whose pages are copied and reordered, and prompts that grow by every token."""
    runs: list[object] = []
    run = CapturedForward.run

    def counted(self: CapturedForward, *given: Any) -> Tensor:
        runs.append(self)
        return run(self, *given)

    monkeypatch.setattr(CapturedForward, "run", counted)
    plain = tiny_llava(depth=2, heads=2, kv_heads=1, head_dim=16)
    policy = policy_of(skip([0], ["image"], "block", kv="omit"))
    batch = random_batch(plain, 3, images=(1, 1), text=(5, 7))
    found = [
        generate(fastskip.apply_(copy.deepcopy(plain), policy, impl=impl), batch, 4, **options)
        for impl in ("triton", "reference")
    ]
    assert torch.equal(*found) and len(runs) == 4 > len(set(map(id, runs)))
