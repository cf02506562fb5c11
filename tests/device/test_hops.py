"""Steps that hop: loops over the layers that some row runs, on the torch form of the operations.

Against the masked dense computation, and against early exits, token for token. The host looks at
the flags instead of a WHILE node.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastskip.decoder.fused import hopping
from fastskip.generation.guarding import Guarding
from fastskip.ops.bodies import HostBodies
from fastskip.ops.overlap import Overlap
from fastskip.routing.weights import LayerScore, write_weights
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.device.conftest import IMPL
from tests.models import tiny_llava
from tests.policies import Policy, parallel, skip
from tests.routing.routed import check_generate, random, routed, similarity

DEPTH = 6
OMIT: Any = {"kv": "omit"}
POLICIES: dict[str, Policy] = {
    **{f"rate {rate}": routed(random(":", "all", rate=rate, **OMIT)) for rate in (0, 0.5, 0.9, 1)},
    "a layer in the middle for all": routed(random([1, 2, 4], "all", rate=0.7, **OMIT)),
    "generated tokens alone": routed(random("2:", ["generated"], rate=0.6, **OMIT)),
    "beside a rule": routed(
        random("2:5", "all", rate=0.7, **OMIT), rules=[skip([0, 5], ["image"], "ffn")]
    ),
    "parallel in front": routed(
        random("3:", "all", rate=0.6, **OMIT), arrangements=(parallel(":2"),)
    ),
    "what the layer before did": routed(similarity(":", "all", threshold=0.6, **OMIT)),
    "how much it changed": routed(similarity("1:", "all", threshold=0.7, measure="change", **OMIT)),
    "by sequence, similarity": routed(
        similarity("1:", "all", threshold=0.6, group="sequence", **OMIT)
    ),
    **{
        f"by {group}, {agree}": routed(random(":", "all", group=group, agree=agree, **OMIT))
        for group, agree in (("batch", "mean"), ("batch", "any"), ("sequence", "mean"))
    },
}
STAY: dict[str, Policy] = {
    "entries of all": routed(random(":", "all", kv="project")),
    "entries from below": routed(random("1:", "all", kv="reuse")),
    "an FFN alone": routed(random(":", "all", "ffn")),
    "parallel inside": routed(random(":", "all", **OMIT), arrangements=(parallel("2:4"),)),
    "a rule inside": routed(random([1, 3], "all", **OMIT), rules=[skip([2], ["generated"], "ffn")]),
    "decisions of two kinds": routed(
        random([1], "all", **OMIT), similarity([2], "all", threshold=0.5, **OMIT)
    ),
    "prompts alone": routed(random(":", ["text", "image"], **OMIT)),
}


class Counting(HostBodies):
    """Notes the turns of each loop."""

    def __init__(self) -> None:
        self.turns: list[int] = []

    def run_while(self, runs: Tensor, begin: Any, body: Any, most: int) -> None:
        self.turns.append(0)

        def counted(condition: int) -> None:
            self.turns[-1] += 1
            body(condition)

        super().run_while(runs, begin, counted, most)
        assert self.turns[-1] <= most


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(depth=DEPTH, attention_bias=True, mlp_bias=True), impl=IMPL)


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, 3, images=(1, 0))


@pytest.fixture
def bodies(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    made = Counting()
    steps = trio.prepared._fastskip.steps
    monkeypatch.setattr("fastskip.decoder.fused.kept_graphs.bodies_on", lambda device: made)
    monkeypatch.setattr("fastskip.generation.device_step.can_overlap", lambda device: True)
    steps.guarding, steps._bodies = Guarding.HOPS, None
    steps._steps.clear()
    yield made
    steps.guarding = Guarding.EARLY_EXIT


def check_hops(trio: Trio, policy: Policy, batch: Batch, new: int = 5) -> None:
    """Right, and what early exits yield: tokens, and every decision. A loop's launches do not
    overlap."""
    steps = trio.prepared._fastskip.steps
    tokens, masks = check_generate(trio, policy, batch, new)
    assert steps._steps and all(step._hopping is not None for step in steps._steps.values())
    assert {step._overlap for step in steps._steps.values()} == {Overlap.NONE}
    steps.guarding = Guarding.EARLY_EXIT
    others, other_masks = check_generate(trio, policy, batch, new)
    assert torch.equal(tokens, others)
    assert masks.keys() == other_masks.keys()
    assert all(torch.equal(mask, other_masks[key]) for key, mask in masks.items())


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_hopped_over_changes_nothing(
    trio: Trio,
    batch: Batch,
    bodies: Counting,
    name: str,
    turns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopping, "TURNS", turns)
    check_hops(trio, POLICIES[name], batch)
    if name == "rate 0":
        assert set(bodies.turns) <= {0, -(-DEPTH // turns)}  # none before a cache is loaded
    if name == "rate 1":
        assert set(bodies.turns) == {0}


def test_one_sequence_takes_the_turns_of_the_layers_that_it_runs(
    trio: Trio, bodies: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopping, "TURNS", 1)
    batch = random_batch(trio.plain, 1, images=(1,))
    _, masks = check_generate(trio, POLICIES["rate 0.5"], batch, new=6)
    skipped = torch.stack([masks[layer, "ffn"][0, batch.columns :] for layer in range(DEPTH)])
    assert bodies.turns[-5:] == (DEPTH - skipped.sum(0)).tolist()
    assert 0 < skipped.sum() < skipped.numel()


def test_learned_scores(trio: Trio, batch: Batch, bodies: Counting, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(DEPTH, 32, generator=generator)
    scores = {layer: LayerScore(own, 0.1 * layer) for layer, own in enumerate(vectors)}
    write_weights(tmp_path / "router.safetensors", scores)
    head = {"layers": ":", "tokens": "all", "skip": ["block"], "kind": "linear", **OMIT}
    rule = head | {"weights": str(tmp_path / "router.safetensors"), "threshold": 0.5}
    check_hops(trio, routed(rule), batch)


def test_layer_norms_and_relu(bodies: Counting) -> None:
    opt = Trio(tiny_llava("llava_opt", depth=3, kv_heads=4), impl=IMPL)
    steps = opt.prepared._fastskip.steps
    steps.guarding = Guarding.HOPS
    check_hops(opt, POLICIES["rate 0.5"], random_batch(opt.plain, 2, images=(1,)))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Routers of whole blocks, mostly of one kind, and a rule somewhere."""
    layers = draw(st.lists(st.integers(0, DEPTH - 1), min_size=1, unique=True))
    fields: dict[str, Any] = {"kv": draw(st.sampled_from(["omit", "omit", "omit", "project"]))}
    fields["group"] = draw(st.sampled_from(["row", "sequence", "batch"]))
    if fields["group"] != "row":
        fields["agree"] = draw(st.sampled_from(["mean", "any"]))
    tokens = draw(st.sampled_from(["all", ["generated"], ["image", "generated"]]))
    is_drawn: bool = draw(st.booleans())
    if is_drawn:
        rate, seed = draw(st.floats(0, 1)), draw(st.integers(0, 5))
        routers = [random(layers, tokens, rate=rate, seed=seed, **fields)]
    else:
        measure = draw(st.sampled_from(["cosine", "change"]))
        fields |= {"measure": measure, "threshold": draw(st.floats(0.2, 0.99))}
        routers = [similarity(layers, tokens, **fields)]
    free = [layer for layer in range(DEPTH) if layer not in layers]
    rules = []
    has_rule: bool = draw(st.booleans())
    if free and has_rule:
        layer, part = draw(st.sampled_from(free)), draw(st.sampled_from(["ffn", "block"]))
        left: dict[str, Any] = {} if part == "ffn" else {"kv": "omit"}
        whose = draw(st.sampled_from([["image"], ["generated"], ["text", "generated"]]))
        rules.append(skip([layer], whose, part, **left))
    return routed(*routers, rules=rules)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=25,
)
@given(policy=policies(), turns=st.integers(1, 4))
def test_any_policy_is_the_same_by_loops(
    trio: Trio, batch: Batch, bodies: Counting, policy: Policy, turns: int
) -> None:
    """Tokens and decisions, whether or not its steps are loops."""
    steps = trio.prepared._fastskip.steps
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopping, "TURNS", turns)
        for guarding in (Guarding.HOPS, Guarding.EARLY_EXIT):
            steps.guarding = guarding
            found.append(check_generate(trio, policy, batch, new=4))
    (tokens, masks), (others, other_masks) = found
    assert torch.equal(tokens, others)
    assert all(torch.equal(mask, other_masks[key]) for key, mask in masks.items())


@pytest.mark.parametrize("name", STAY)
def test_other_plans_keep_early_exits(
    trio: Trio, batch: Batch, bodies: Counting, name: str
) -> None:
    check_generate(trio, STAY[name], batch, new=3)
    steps = trio.prepared._fastskip.steps
    assert steps._steps and all(step._hopping is None for step in steps._steps.values())
    assert {step._overlap for step in steps._steps.values()} == {Overlap.START}
    assert not bodies.turns
