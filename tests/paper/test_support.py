"""Where the paper's modes run, and that others say so instead of running something else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastskip
from fastskip.families import UnsupportedModelError
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.verification.cells import UncheckedPolicyError
from fastskip.verification.oracle import MaskedOracle
from tests.batches import random_batch
from tests.models import tiny_llava, tiny_opt

SHAPE: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 8, "hidden": 32, "depth": 6}
PLAIN_ONLY: dict[str, tuple[SkipPolicy, str]] = {
    "scope": (
        SkipPolicy.preset("paper/parallel-attention", scope="generated"),
        "only some token",
    ),
    "pairs": (
        SkipPolicy.preset("paper/parallel-block", semantics="reference"),
        "mean of its K and V",
    ),
    "hidden": (
        SkipPolicy.preset("paper/skip-attention", scope="prompt", kv="hidden"),
        "kv hidden in layer 2",
    ),
    "mask": (SkipPolicy.preset("paper/unimodal-mask"), "unimodal mask in layer 0"),
    "entropy": (SkipPolicy.preset("paper/entropy"), "paper.entropy"),
    "exit": (SkipPolicy.preset("paper/exit"), "paper.exit"),
}


@pytest.mark.reference
@pytest.mark.parametrize("name", PLAIN_ONLY)
def test_the_device_executor_refuses_by_name(name: str) -> None:
    policy, reason = PLAIN_ONLY[name]
    model = tiny_llava(**SHAPE)
    with pytest.raises(UnsupportedModelError, match=reason):
        fastskip.apply_(copy.deepcopy(model), policy, impl="torch")
    prepared = fastskip.apply_(copy.deepcopy(model), impl="torch")
    with pytest.raises(UnsupportedModelError, match=reason):
        fastskip.set_policy(prepared, policy)
    assert fastskip.plan_of(prepared).is_dense
    fastskip.apply_(model, policy)


@pytest.mark.parametrize("name", ["skip-block", "skip-ffn", "skip-attention", "parallel-attention"])
def test_the_device_executor_runs_reference_modes_for_all_rows(name: str) -> None:
    """Those that need nothing but what it has."""
    model = tiny_llava(**SHAPE)
    policy = SkipPolicy.preset(f"paper/{name}", semantics="reference")
    batch = random_batch(model, 3, images=(1, 2), text=(2, 5))
    plain = fastskip.apply_(copy.deepcopy(model), policy, impl="reference")
    device = fastskip.apply_(copy.deepcopy(model), policy, impl="torch")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        plain.generate(**batch.inputs(), **options), device.generate(**batch.inputs(), **options)
    )


@pytest.mark.parametrize("family", ["llava", "opt"])
def test_what_no_masked_computation_can_say_is_refused(family: str) -> None:
    model = tiny_opt() if family == "opt" else tiny_llava(**SHAPE)
    name = "skip-attention" if family == "opt" else "parallel-block"
    policy = SkipPolicy.preset(f"paper/{name}", interval=2, end=-2, semantics="reference")
    with pytest.raises(UncheckedPolicyError, match="allowed"):
        MaskedOracle(model, policy.to_dict())


@pytest.mark.reference
@pytest.mark.parametrize("name", ["parallel-block", "skip-attention", "unimodal-mask"])
@torch.no_grad()
def test_caches_of_these_modes_crop_and_reorder(name: str) -> None:
    """A prompt, some columns taken back, and others in their place, for sequences in new order."""
    options = {} if name == "unimodal-mask" else {"semantics": "reference"}
    policy = SkipPolicy.preset(f"paper/{name}", **options)
    model = fastskip.apply_(tiny_llava(**SHAPE), policy)
    batch = random_batch(model, 4, images=(0, 0), text=(6, 6))
    ids = batch.input_ids
    whole = model(ids[:, :4], use_cache=True)
    cache = getattr(whole, CACHE_NAME)
    longer = model(ids[:, 4:], use_cache=True, **{CACHE_NAME: cache})
    cache = getattr(longer, CACHE_NAME)
    cache.crop(4)
    cache.reorder_cache(torch.tensor([1, 0]))
    again = model(ids.flip(0)[:, 4:], use_cache=True, **{CACHE_NAME: cache})
    assert torch.equal(again.logits.flip(0), longer.logits)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["skip-attention", "parallel-block", "unimodal-mask", "entropy"])
@torch.no_grad()
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if name == "unimodal-mask" else {"semantics": "reference"}
    options |= {"scope": "prompt"} if name == "skip-attention" else {}
    policy = SkipPolicy.preset(f"paper/{name}", **options)
    model = fastskip.apply_(tiny_llava(**SHAPE), policy)
    model.save_pretrained(tmp_path)
    again = fastskip.load_model(tmp_path)
    assert fastskip.plan_of(again).policy == policy
    batch = random_batch(model, 4, images=(1, 0), text=(4, 6))
    assert torch.equal(again(**batch.inputs()).logits, model(**batch.inputs()).logits)


@pytest.mark.parametrize("name", ["skip-block", "unimodal-mask", "parallel-block"])
def test_what_stock_models_cannot_say_is_not_exported(name: str, tmp_path: Path) -> None:
    options = {} if name == "unimodal-mask" else {"semantics": "reference"}
    policy = SkipPolicy.preset(f"paper/{name}", **options)
    model = fastskip.apply_(tiny_llava(**SHAPE), policy)
    with pytest.raises(PolicyError, match="export_per_layer_config"):
        model.save_pretrained(tmp_path, export_per_layer_config=True)
