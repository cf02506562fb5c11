"""Linear routers: learned scores, thresholds, capacity, and weights that do not fit."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastskip
from fastskip import PolicyError, RouterError, RouterRule, SkipPolicy, Sublayer
from fastskip.routing.routers import ScoreRouter
from fastskip.routing.weights import LayerScore, read_weights, write_weights
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.routing.routed import check_forward, check_generate, routed

HIDDEN, DEPTH = 32, 4


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, images=(2, 0, 1), seed=6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "router.safetensors"
    generator = torch.Generator().manual_seed(0)
    scores = {
        layer: LayerScore(torch.randn(HIDDEN, generator=generator) / HIDDEN**0.5, 0.1 * layer)
        for layer in range(1, DEPTH)
    }
    write_weights(path, scores)
    return path


def linear(weights: Path, layers: Any = "1:", tokens: Any = "all", **fields: Any) -> dict[str, Any]:
    head = {"layers": layers, "tokens": tokens, "skip": ["block"], "kind": "linear"}
    return head | {"weights": str(weights)} | fields


def test_file_reads_back(weights: Path) -> None:
    found = read_weights(weights, (1, 3), HIDDEN, "weights")
    stored = load_file(weights)
    assert torch.equal(found[3].weight, stored["layers.3.weight"])
    assert found[3].bias == pytest.approx(0.3) and set(found) == {1, 3}


@pytest.mark.parametrize("kv", ("project", "omit"))
@pytest.mark.parametrize(
    "fields", ({}, {"group": "sequence"}, {"group": "batch", "agree": "any"}), ids=str
)
def test_threshold(
    trio: Trio, batch: Batch, weights: Path, kv: str, fields: dict[str, Any]
) -> None:
    policy = routed(linear(weights, threshold=0.2, kv=kv, **fields))
    masks = check_forward(trio, policy, batch)
    if not fields:
        assert any(mask.any() for mask in masks.values())
        assert not all(mask[batch.real].all() for mask in masks.values())
    check_generate(trio, policy, batch)


def test_low_scores_skip(trio: Trio, batch: Batch, weights: Path) -> None:
    """By hand, from the hidden states that enter layer 1."""
    with torch.no_grad():
        entering = trio.prepared  # the dense model's
        fastskip.set_policy(entering, routed())
        h = entering(**batch.inputs(), output_hidden_states=True).hidden_states[1]
    own = load_file(weights)
    rms = (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scores = (h / rms) @ own["layers.1.weight"] + own["layers.1.bias"]
    bar = float(scores[batch.real].median()) + 1e-4
    masks = check_forward(trio, routed(linear(weights, [1], threshold=bar)), batch)
    assert torch.equal(masks[1, "ffn"][batch.real], scores[batch.real] <= bar)


@pytest.mark.parametrize("capacity", (0.01, 0.34, 0.5, 1.0))
def test_capacity_is_a_share_of_each_sequence(
    trio: Trio, batch: Batch, weights: Path, capacity: float
) -> None:
    policy = routed(linear(weights, tokens=["image", "text"], capacity=capacity))
    masks = check_forward(trio, policy, batch)
    for mask in masks.values():
        for index in range(batch.size):
            rows = mask[index, batch.real[index]]
            assert int((~rows).sum()) == math.ceil(capacity * len(rows))
    alone = check_forward(trio, policy, batch.alone(0))
    for key, mask in alone.items():
        assert torch.equal(mask[0], masks[key][0, batch.real[0]])
    tokens, _ = check_generate(trio, policy, batch)
    assert tokens.shape[1] == 4


def test_a_capacity_is_the_decimal_that_was_written(weights: Path) -> None:
    scores = {1: LayerScore(torch.zeros(HIDDEN), 0.0)}
    written = [*(f"{n / 1000:.3f}" for n in range(1, 1001)), "1e-9", "0.3333333333333333"]
    for text in written:
        rule = RouterRule(**linear(weights, [1], ["image"], capacity=float(text)))
        share = ScoreRouter(rule, scores).terms(1).capacity
        assert share is not None
        for rows in (1, 2, 3, 25, 50, 100, 576, 1000, 2880, 1 << 20):
            assert math.ceil(share * rows) == math.ceil(Fraction(text) * rows), (text, rows)


def changed(path: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    new: dict[str, Any] = {
        **load_file(path),
        **{k.replace("__", "."): v for k, v in tensors.items()},
    }
    save_file({k: v for k, v in new.items() if v is not None}, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_weights_that_do_not_fit(trio: Trio, weights: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(PolicyError, match=rf"routers\[0\].weights: .*{message}"):
            fastskip.set_policy(trio.prepared, routed(linear(path, threshold=0.0)))

    refused(tmp_path / "none.safetensors", "allowed: a safetensors file")
    (tmp_path / "text.safetensors").write_text("no tensors")
    refused(tmp_path / "text.safetensors", "allowed: a safetensors file")
    refused(changed(weights, tmp_path, layers__2__weight=None), "no layers.2.weight")
    wide = torch.zeros(HIDDEN + 1)
    refused(changed(weights, tmp_path, layers__2__weight=wide), r"another model.*\[32\]")
    nan = torch.full((HIDDEN,), math.nan)
    refused(changed(weights, tmp_path, layers__2__weight=nan), "non-finite")
    refused(changed(weights, tmp_path, layers__2__bias=torch.tensor([math.inf])), "non-finite")
    refused(changed(weights, tmp_path, layers__2__bias=torch.zeros(2)), "shape")


def test_hidden_states_that_are_not_finite(batch: Batch, weights: Path) -> None:
    model: Any = tiny_llava()
    model.model.language_model.embed_tokens.weight.data[:] = math.nan
    fastskip.apply_(model, routed(linear(weights, threshold=0.0)), impl="reference")
    with pytest.raises(RouterError, match="layer 1: a score is NaN"), torch.no_grad():
        model(**batch.inputs())


def test_paths_start_at_the_policy_file(weights: Path, tmp_path: Path) -> None:
    rule = linear(Path(weights.name), threshold=0.5)
    document = routed(rule)
    (weights.parent / "policy.json").write_text(json.dumps(document))
    policy = SkipPolicy.from_file(weights.parent / "policy.json")
    assert policy.routers[0].weights == weights.name
    assert policy.path_of(weights.name) == weights
    fastskip.apply_(tiny_llava(), policy)
    policy.save(tmp_path / "moved.json")
    moved = SkipPolicy.from_file(tmp_path / "moved.json")
    assert moved.path_of(str(moved.routers[0].weights)).resolve() == weights.resolve()
    fastskip.apply_(tiny_llava(), tmp_path / "moved.json")


def test_record_counts(trio: Trio, batch: Batch, weights: Path) -> None:
    policy = routed(linear(weights, [2], ["image"], capacity=0.5))
    model = fastskip.set_policy(trio.prepared, policy)
    with torch.no_grad(), fastskip.record_routing(model) as record:
        model(**batch.inputs())
    assert record.rates() == {(2, sublayer): 0.5 for sublayer in sorted(Sublayer)}
    assert record.rate == 0.5


def test_records_that_end_in_the_order_they_began(trio: Trio, batch: Batch, weights: Path) -> None:
    """As those of two threads may: each ends for itself, and none is left behind."""
    policy = routed(linear(weights, [2], ["image"], capacity=0.5))
    model = fastskip.set_policy(trio.prepared, policy)
    first, second = fastskip.record_routing(model), fastskip.record_routing(model)
    with torch.no_grad():
        a = first.__enter__()
        model(**batch.inputs())
        b = second.__enter__()
        model(**batch.inputs())
        first.__exit__(None, None, None)
        model(**batch.inputs())
        second.__exit__(None, None, None)
        model(**batch.inputs())
    assert (len(a.forwards), len(b.forwards)) == (1, 2)
    assert model._fastskip.decoder.record is None
