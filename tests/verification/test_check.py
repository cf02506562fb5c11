"""`verify` passes what is right, and names the place of what is wrong."""

import copy
from typing import Any

import pytest
import torch

import fastskip
from fastskip.decoder.layer import Block
from fastskip.policy import TokenClass
from fastskip.verification import check
from fastskip.verification.cells import UncheckedPolicyError
from fastskip.verification.check import Report, verify
from tests.batches import random_batch
from tests.models import tiny_llama, tiny_llava
from tests.policies import Policy, parallel, policy_of, skip

POLICY = policy_of(
    skip("1:3", ["image"], "block", kv="reuse"),
    skip([3], ["generated"], "ffn"),
    arrangements=(parallel([0]),),
)


def report(policy: Policy | None = POLICY, seed: int = 1, **options: Any) -> Report:
    model = tiny_llava()
    batch = random_batch(model, seed, images=(1, 0, 2), **options)
    return verify(model, policy, batch.inputs(), max_new_tokens=5)


ROUTED = policy_of(skip([3], ["image"], "ffn")) | {
    "routers": [
        {"layers": [0, 2], "tokens": "all", "skip": ["block"], "kind": "random", "rate": 0.5}
        | {"kv": "omit", "group": "sequence"},
        {"layers": [1], "tokens": ["text"], "skip": ["ffn"], "kind": "similarity"}
        | {"threshold": 0.5},
    ]
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("policy", [None, POLICY, ROUTED])
def test_it_holds(policy: Policy | None, padding: str) -> None:
    found = report(policy, padding=padding)
    assert found.holds
    assert found.first_difference is None and not found.wrong_tokens
    assert (found.dtype, found.truth_dtype) == ("float32", "float64")
    assert found.tokens_checked == 15
    assert "holds (float32, truth in float64)" in str(found)
    assert "15 of 15" in str(found)


def test_a_fault_under_routers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Block._ffn

    def wrong(self: Block, h: Any, *rest: Any) -> Any:
        found = right(self, h, *rest)
        return found if self.plan.index != 2 or found is None else 1.01 * found

    monkeypatch.setattr(Block, "_ffn", wrong)
    # Row by row, so that some run the layer in every forward.
    draws = {"layers": [0, 2], "skip": ["block"], "kind": "random", "rate": 0.5, "kv": "omit"}
    found = report(policy_of() | {"routers": [draws]})
    assert not found.holds
    assert found.first_difference is not None and found.first_difference.layer == 2


def draws(skips: str, tokens: str | list[str] = "all", layer: int = 2) -> Policy:
    rule = {"layers": [layer], "tokens": tokens, "skip": [skips], "kind": "random", "rate": 0.5}
    return policy_of() | {"routers": [rule]}


@pytest.mark.parametrize(
    ("asked", "done"),
    [
        (draws("ffn"), draws("block")),
        (draws("block"), draws("ffn")),
        (draws("block"), draws("attention")),
        (draws("ffn", ["text"]), draws("ffn")),
        (draws("ffn"), draws("ffn", layer=1)),
    ],
    ids=["too much", "no attention", "no FFN", "others' rows", "another layer"],
)
def test_decisions_beyond_the_policy_are_faults(
    asked: Policy, done: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report(asked).holds
    monkeypatch.setattr(check, "apply_", lambda model, policy: fastskip.apply_(model, done))
    found = report(asked)
    assert not found.holds and found.first_difference is not None


def test_it_holds_in_bfloat16_and_leaves_the_model_alone() -> None:
    model = tiny_llava("llava_next_mistral", dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    batch = random_batch(model, images=(1, 1))
    assert verify(model, POLICY, batch.inputs(), max_new_tokens=3).holds
    assert not hasattr(model, "_fastskip")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sequences_go_on_past_their_end_and_options_of_the_checkpoint_do_not_matter() -> None:
    model = tiny_llama()
    batch = random_batch(model, images=(0,))
    first = model.generate(**batch.inputs(), max_new_tokens=1, do_sample=False)[0, -1]
    model.generation_config.update(eos_token_id=int(first), do_sample=True, repetition_penalty=3.0)
    found = verify(model, None, {"input_ids": batch.input_ids}, max_new_tokens=4)
    assert found.holds and found.tokens_checked == 4


def test_a_narrow_truth_where_fp64_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_free_bytes", lambda device: 1000)
    model = tiny_llama(dtype=torch.bfloat16)
    inputs = random_batch(model, images=(0,)).inputs()
    found = verify(model, None, inputs, max_new_tokens=2)
    assert found.holds and found.truth_dtype == "float32"
    # fp32 is no truth for itself.
    assert verify(tiny_llama(), None, inputs, max_new_tokens=2).truth_dtype == "float64"


@pytest.mark.parametrize(
    ("policy", "images", "new_tokens", "absent"),
    [
        (policy_of(skip([1], ["image"], "ffn")), (0, 0), 2, "image"),
        (policy_of(skip([1], ["image", "generated"], "ffn")), (0, 0), 1, "image and generated"),
        (policy_of(skip([1], ["generated"], "ffn")), (1,), 1, "generated"),
        (
            policy_of() | {"removals": [{"after_layer": 1, "keep": {"by": "spacing", "ratio": 0}}]},
            (0,),
            2,
            "image",
        ),
    ],
)
def test_a_policy_about_rows_that_are_not_there_is_not_proven(
    policy: Policy, images: tuple[int, ...], new_tokens: int, absent: str
) -> None:
    model = tiny_llava()
    inputs = random_batch(model, images=images).inputs()
    with pytest.raises(UncheckedPolicyError, match=f"{absent} rows, and this input has none"):
        verify(model, policy, inputs, max_new_tokens=new_tokens)
    # It does not matter to a policy about others.
    others = policy_of(skip([1], ["text"], "ffn"))
    assert verify(model, others, inputs, max_new_tokens=new_tokens).holds


def test_a_report_says_what_of_a_policy_was_not_checked() -> None:
    model = tiny_llava()
    inputs = random_batch(model, images=(0, 0)).inputs()
    report = verify(model, policy_of(skip([1], "all", "ffn")), inputs, max_new_tokens=2)
    assert report.holds and report.absent == ("image",)
    assert "image rows: none in this input, so not checked" in str(report)


def test_a_prepared_model_and_an_empty_answer_are_refused() -> None:
    model = tiny_llama()
    inputs = random_batch(model, images=(0,)).inputs()
    with pytest.raises(ValueError, match="max_new_tokens: 0; allowed"):
        verify(model, None, inputs, max_new_tokens=0)
    with pytest.raises(ValueError, match="inputs: no input_ids; allowed"):
        verify(model, None, {"inputs_embeds": torch.zeros(1, 2, 32)})
    with pytest.raises(TypeError, match="already prepared"):
        verify(fastskip.apply_(model), None, inputs)


def sabotage(monkeypatch: pytest.MonkeyPatch, layer: int, token_class: TokenClass) -> None:
    """The FFN of one layer also feeds a class that should skip it, or does not feed one."""
    prepare = fastskip.apply_

    def wrong(model: Any, policy: Any) -> Any:
        model = prepare(model, policy)
        changed = fastskip.plan_of(model)
        rows = changed.layers[layer].__dict__
        rows["feeding"] = changed.layers[layer].feeding ^ {token_class}
        return model

    monkeypatch.setattr(check, "apply_", wrong)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_image_rows_that_should_skip(monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    sabotage(monkeypatch, 2, TokenClass.IMAGE)
    found = report(padding=padding)
    assert not found.holds and not found.prompt.holds
    place = found.first_difference
    assert place is not None
    batch = random_batch(tiny_llava(), 1, images=(1, 0, 2), padding=padding)  # type: ignore[arg-type]
    first_image = int(batch.token_classes[0].eq(0).nonzero()[0])
    assert (place.layer, place.sequence, place.column) == (2, 0, first_image)
    assert place.token_class == "image"
    assert "DOES NOT HOLD" in str(found)
    assert f"first difference: output of layer 2, sequence 0, column {first_image}" in str(found)


def test_generated_rows_that_should_not_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, 1, TokenClass.GENERATED)
    found = report()
    assert found.prompt.holds and not found.decoding.holds
    place = found.first_difference
    assert place is not None
    columns = random_batch(tiny_llava(), 1, images=(1, 0, 2)).columns
    assert (place.layer, place.sequence, place.column) == (1, 0, columns)
    assert place.token_class == "generated"


def test_wrong_tokens_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = fastskip.apply_

    def wrong(model: Any, policy: Any) -> Any:
        model = prepare(model, policy)
        generate = model.generate

        def choose_the_worst(**options: Any) -> Any:
            out = generate(**options)
            out.sequences[1:, -1] = out.logits[-1][1:].argmin(dim=-1)
            return out

        model.generate = choose_the_worst
        return model

    monkeypatch.setattr(check, "apply_", wrong)
    found = report()
    assert not found.holds and found.prompt.holds and found.decoding.holds
    assert [(wrong.sequence, wrong.step) for wrong in found.wrong_tokens] == [(1, 4), (2, 4)]
    first = found.wrong_tokens[0]
    assert f"new token 4: {first.chosen} instead of {first.expected}" in str(found)
    assert "13 of 15" in str(found)
    # One forward over all rows does nothing wrong, so the report points at decoding.
    assert found.first_difference is None
    assert "the decode step" in str(found)


@pytest.mark.reference
def test_not_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Block.run

    def wrong(self: Block, *args: Any) -> Any:
        out = run(self, *args)
        return out * torch.nan if self.plan.index == 3 else out

    monkeypatch.setattr(Block, "run", wrong)
    found = report()
    assert not found.holds
    assert found.first_difference is not None and found.first_difference.layer == 3
