"""Routed models on the kernels: interpreted here, compiled on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastskip.decoder.fused import hopping
from fastskip.generation.guarding import Guarding
from fastskip.kernels import tuning
from fastskip.ops.account import counted
from fastskip.routing.weights import LayerScore, write_weights
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.device.interpreted import STREAM
from tests.models import tiny_llava
from tests.policies import parallel, skip
from tests.routing.routed import check_forward, check_generate, random, routed, similarity

HIDDEN = 48
POLICIES: dict[str, dict[str, Any]] = {
    "block, omit": routed(random([0, 2], "all", "block", kv="omit")),
    "attention, reuse": routed(random([1, 3], ["text", "generated"], "attention", kv="reuse")),
    "FFN beside a rule": routed(
        random([1, 2], ["text", "generated"], "ffn", seed=1),
        rules=[skip([1], ["image"], "ffn"), skip([2], ["image"], "block", kv="omit")],
    ),
    "similarity, FFN": routed(similarity("1:", "all", "ffn", threshold=0.8, measure="change")),
    "similarity, in groups": routed(
        similarity([2, 3], "all", "block", threshold=0.7, group="sequence"),
    ),
    "parallel": routed(
        random([1], "all", "ffn"),
        random([1, 2], "all", "attention", kv="omit", seed=7, group="batch", agree="any"),
        arrangements=(parallel(":"),),
    ),
}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    """Grouped queries, biases, and sizes that are no multiples of a block."""
    return tiny_llava(
        hidden=HIDDEN, ffn=72, heads=4, kv_heads=2, head_dim=16, attention_bias=True, mlp_bias=True
    )


@pytest.fixture(scope="module")
def trio(plain: PreTrainedModel) -> Trio:
    return Trio(plain, impl="triton")


@pytest.fixture(scope="module")
def opt() -> Trio:
    return Trio(tiny_llava("llava_opt", hidden=HIDDEN, ffn=72, heads=3), impl="triton")


@pytest.fixture(scope="module")
def batch(plain: PreTrainedModel) -> Batch:
    return random_batch(plain, 3, images=(1, 0))


@pytest.mark.parametrize("name", POLICIES)
def test_generates_what_the_masked_model_does(name: str, trio: Trio, batch: Batch) -> None:
    with tuning.table(STREAM), counted() as account:
        _, masks = check_generate(trio, POLICIES[name], batch, new=3)
    assert any(mask.any() for mask in masks.values())
    assert account.by_kernel["head"][0] == 2  # every step ran on kernels


@pytest.mark.parametrize("name", ["attention, reuse", "parallel"])
def test_layer_norms_and_relu(name: str, opt: Trio) -> None:
    batch = random_batch(opt.plain, 3, images=(1, 0))
    with tuning.table(STREAM), counted() as account:
        _, masks = check_generate(opt, POLICIES[name], batch, new=3)
    assert any(mask.any() for mask in masks.values())
    assert account.by_kernel["head"][0] == 2


def test_learned_scores(trio: Trio, batch: Batch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {
        layer: LayerScore(torch.randn(HIDDEN, generator=generator) / HIDDEN**0.5, 0.0)
        for layer in range(4)
    }
    write_weights(tmp_path / "router.safetensors", scores)
    head = {"kind": "linear", "weights": str(tmp_path / "router.safetensors")}
    policy = routed(
        head | {"layers": [0, 2], "tokens": ["image", "text"], "skip": ["block"], "capacity": 0.5},
        head | {"layers": [1, 2], "tokens": ["generated"], "skip": ["ffn"], "threshold": 0.0},
    )
    with tuning.table(STREAM):
        check_generate(trio, policy, batch, new=3)


@pytest.fixture
def hops(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps are loops, a layer a turn."""
    monkeypatch.setattr(hopping, "TURNS", 1)
    steps = trio.prepared._fastskip.steps
    steps.guarding = Guarding.HOPS
    yield
    steps.guarding = Guarding.EARLY_EXIT


@pytest.mark.parametrize("name", ["block, omit", "similarity by rows", "learned, by sequence"])
def test_what_nobody_runs_has_no_launch(
    name: str, trio: Trio, batch: Batch, hops: None, tmp_path: Path
) -> None:
    """Steps that hop: right, and as many launches as layers that some row ran."""
    learned = {"kind": "linear", "weights": str(tmp_path / "router.safetensors"), "threshold": 0.2}
    learned |= {"layers": ":", "tokens": "all", "skip": ["block"], "kv": "omit"}
    generator = torch.Generator().manual_seed(1)
    scores = {
        layer: LayerScore(torch.randn(HIDDEN, generator=generator) / HIDDEN**0.5, 0.1 * layer)
        for layer in range(4)
    }
    write_weights(tmp_path / "router.safetensors", scores)
    policy = {
        "block, omit": routed(random(":", "all", "block", kv="omit", rate=0.7)),
        "similarity by rows": routed(similarity(":", "all", "block", threshold=0.6, kv="omit")),
        "learned, by sequence": routed(learned | {"group": "sequence"}),
    }[name]
    with tuning.table(STREAM), counted() as account:
        _, masks = check_generate(trio, policy, batch, new=4)
    steps = torch.stack([masks[layer, "ffn"][:, batch.columns :] for layer in range(4)])
    ran = int((~steps.all(dim=1)).sum())
    assert 0 < ran < steps.shape[0] * steps.shape[2]
    launches = {kernel: own[0] for kernel, own in account.by_kernel.items()}
    # The prompt, launch by launch, has its own.
    assert launches["feed"] == launches["attend_step"] + 4 == ran + 4
    assert launches["begin_hops"] == steps.shape[2]


def test_rows_of_a_longer_prompt() -> None:
    """More rows than flags alone serve: compacted, gathered and scattered; and library products,
    with biases and rotary tables of their own, in the layer without routers."""
    trio = Trio(
        tiny_llava(depth=2, hidden=32, ffn=48, attention_bias=True, mlp_bias=True), impl="triton"
    )
    batch = random_batch(trio.plain, 5, images=(1, 0), text=(33, 36))
    assert 64 < int(batch.real.sum()) < 80
    policy = routed(
        random([1], "all", "attention", kv="omit", seed=1), random([1], ["text"], "ffn", seed=2)
    )
    with tuning.table(STREAM), counted() as account:
        check_forward(trio, policy, batch)
    assert {"library_product", "linear_rows", "compact", "place_entries"} <= set(account.by_kernel)
