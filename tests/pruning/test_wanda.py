"""Wanda against a plain restatement, and pads that have no effect."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import fastskip
from fastskip.sparse.matrices import matrices
from fastskip.study.pruning import PruningError, Recipe, WeightMasks, find_masks, prune_
from tests.batches import random_batch
from tests.models import LLAVA_KINDS, tiny_llama, tiny_llava, tiny_opt
from tests.pruning.plain import blocks_of, linears_of, wanda_

KINDS = (*LLAVA_KINDS, "qwen2_5_vl", "qwen3_vl", "llama", "opt")


def build(kind: str) -> Any:
    if kind not in ("llama", "opt"):
        return tiny_llava(kind)  # type: ignore[arg-type]
    return tiny_llama() if kind == "llama" else tiny_opt()


def batches(model: Any, padding: Any = "left") -> list[Any]:
    images = (1, 2) if model.config.get_text_config() is not model.config else (0, 0)
    return [random_batch(model, seed, images=images, padding=padding) for seed in range(3)]


def alone(model: Any) -> list[dict[str, Any]]:
    return [batch.alone(index).inputs() for batch in batches(model) for index in range(2)]


def as_masks(masks: WeightMasks) -> dict[str, torch.Tensor]:
    return {name: own.mask for name, own in masks.kept.items()}


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_the_plain_form_keeps(kind: str, ratio: float) -> None:
    model = build(kind)
    plain = copy.deepcopy(model)
    expected = wanda_(plain, alone(plain), ratio)
    masks = prune_(model, Recipe("wanda", ratio), alone(model))
    found = as_masks(masks)
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_pads_have_no_effect(kind: str, padding: str) -> None:
    model = build(kind)
    padded = [batch.inputs() for batch in batches(model, padding)]
    assert any(bool((inputs["attention_mask"] == 0).any()) for inputs in padded)
    recipe = Recipe("wanda", 0.5)
    assert find_masks(model, recipe, padded) == find_masks(model, recipe, alone(model))
    # What a pad holds is seen by nobody either.
    for inputs in padded:
        pads = inputs["attention_mask"] == 0
        inputs["input_ids"] = inputs["input_ids"].masked_fill(pads, 7)
    assert find_masks(model, recipe, padded) == find_masks(model, recipe, alone(model))


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_a_prepared_model_gets_the_same_masks(kind: str) -> None:
    recipe, model = Recipe("wanda", 0.5), build(kind)
    expected = find_masks(model, recipe, alone(model))
    ours = fastskip.apply_(copy.deepcopy(model), "every_nth_block", impl="reference")
    assert find_masks(ours, recipe, alone(model)) == expected


def test_adapters_that_add_nothing_change_nothing() -> None:
    model, recipe = build("llama"), Recipe("wanda", 0.5)
    expected = find_masks(model, recipe, alone(model))
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], lora_dropout=0.5)
    )
    assert find_masks(wrapped, recipe, alone(model)) == expected


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_by_activations(pattern: str) -> None:
    model = build("llava")
    kept, group = map(int, pattern.split(":"))
    masks = prune_(model, Recipe("wanda", pattern=pattern), alone(model))
    for matrix in matrices(model):
        groups = (matrix.weight != 0).view(-1, group).sum(1)
        assert (groups == kept).all(), matrix.name
    by_size = find_masks(build("llava"), Recipe("magnitude", pattern=pattern))
    assert masks != by_size  # inputs had a say


def test_later_layers_see_pruned_inputs() -> None:
    model = build("llava")
    every = find_masks(model, Recipe("wanda", 0.7), alone(model))
    last = find_masks(model, Recipe("wanda", 0.7, layers=[3]), alone(model))
    differing = [n for n, own in last.kept.items() if not torch.equal(own.mask, every.kept[n].mask)]
    assert len(last.kept) == 7 and len(differing) >= 4


def test_the_model_is_left_as_it_was() -> None:
    model = build("llava").train()
    model.model.vision_tower.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    find_masks(model, Recipe("wanda", 0.5), alone(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    linears = [m for layer in blocks_of(model) for m in linears_of(layer).values()]
    assert linears and not any(m._forward_pre_hooks or m._forward_hooks for m in linears)


def test_what_is_not_finite_is_named_and_undone() -> None:
    model = build("llava")
    linears_of(blocks_of(model)[2])["mlp.up_proj"].weight.data[0, 0] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruningError, match=r"layers\.2\.mlp\.down_proj: its input is not finite"):
        prune_(model, Recipe("wanda", 0.5), alone(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_samples_are_needed_and_must_hold_rows() -> None:
    model = build("llama")
    with pytest.raises(PruningError, match="samples: none; allowed: one or more"):
        prune_(model, Recipe("wanda", 0.5))
    inputs = batches(model)[0].inputs()
    inputs["attention_mask"][1] = 0
    with pytest.raises(PruningError, match=r"samples\[0\]: sequence 1 is all padding"):
        prune_(model, Recipe("wanda", 0.5), [inputs])


def test_a_prepared_llava_around_opt() -> None:
    """Whose language model holds the decoder that we run."""
    recipe, model = Recipe("wanda", 0.5), build("llava_opt")
    expected = find_masks(model, recipe, alone(model))
    ours = fastskip.apply_(copy.deepcopy(model), impl="reference")
    assert find_masks(ours, recipe, alone(model)) == expected
    batch = alone(model)[0]
    with torch.no_grad():  # and is prepared as before
        assert torch.equal(ours(**batch).logits, fastskip.apply_(model)(**batch).logits)
