"""What changes save adds up to what the whole policy saves, and says no more than the plan."""

import numpy as np
import pytest

from fastskip.plan import ModelShape, make_plan
from fastskip.plan.costs import Ceilings, floor_seconds
from fastskip.plan.single_call import SingleCall
from fastskip.policy import SkippedKV, SkipPolicy, TokenClass
from fastskip.study.search.budget import parse_budget
from fastskip.study.search.changes import Choice, changes_of, choices_of, merged, policy_of, span_of
from fastskip.study.search.costing import PARTS, Costing, flops_of, phase_of
from fastskip.study.search.latency import Timed, fit, probes
from fastskip.study.search.matching import Entrant, Match
from fastskip.study.search.pricing import Pricing
from fastskip.study.search.uniform import at_random

SHAPE = ModelShape(
    depth=5,
    hidden_size=64,
    ffn_size=160,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    has_images=True,
    dtype_bytes=4,
    max_positions=512,
)
COSTING = Costing(SHAPE, SingleCall(20, 9, 2, 7), Ceilings(1e9, 1e11))


def drawn(seed: int) -> list[tuple[int, Choice]]:
    rng, layer = np.random.default_rng(seed), 0
    places: list[tuple[int, Choice]] = []
    while layer < SHAPE.depth:
        changes = [
            x for x in changes_of(layer, SHAPE.depth, SHAPE.classes) if x.kv is not SkippedKV.REUSE
        ]
        choices = choices_of(changes, SHAPE.classes)
        choice = choices[int(rng.integers(len(choices)))]
        if rng.random() < 0.3:  # wirings are few among so many
            choice = choices[-1]
        places.append((layer, choice))
        layer += span_of(choice)
    return places


@pytest.mark.parametrize("seed", range(20))
def test_savings_add_up(seed: int) -> None:
    places = drawn(seed)
    parts = np.sum([COSTING.saved(layer, choice) for layer, choice in places], axis=0)
    whole = COSTING.dense - COSTING.of(policy_of(places))
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)


def test_numbers_are_the_plans() -> None:
    for policy in (SkipPolicy(), SkipPolicy.preset("frozen_visual", start=1)):
        plan = make_plan(policy, SHAPE)
        cost = plan.cost(20, 9, 7, text_before=2)
        numbers = COSTING.of(policy)
        assert flops_of(numbers) == cost.flops
        heads = [sum(x for x in phase_of(numbers, name)[:2]) for name in ("prefill", "decode")]
        for found, own in zip(heads, (cost.prefill, cost.decode), strict=True):
            lm_head = [op for op in own.ops if op.kind == "lm_head"]
            whole = floor_seconds(own, COSTING.ceilings) / max(own.steps, 1)
            rest = sum(max(op.bytes / 1e9, op.flops / 1e11) for op in lm_head)
            assert found == pytest.approx(whole - rest)


def test_choices_are_each_said_once() -> None:
    changes = changes_of(2, SHAPE.depth, SHAPE.classes)
    choices = choices_of(changes, SHAPE.classes)
    plans = {make_plan(policy_of([(2, choice)]), SHAPE).fingerprint for choice in choices}
    assert len(plans) == len(choices)
    plain = changes_of(2, SHAPE.depth, SHAPE.classes, keeps_answers=True)
    assert set(plain) < set(changes)
    omitting = [x for x in plain if x.kv is SkippedKV.OMIT]
    assert omitting and not [x for x in omitting if TokenClass.GENERATED in x.tokens]
    joint = [x for x in changes if len(x.tokens) == 3 and x.skip]
    for change in joint:
        whole = make_plan(policy_of([(2, (change,))]), SHAPE).fingerprint
        apart = next(c for c in choices if merged(c, changes) == (change,))
        assert make_plan(policy_of([(2, apart)]), SHAPE).fingerprint == whole


@pytest.mark.parametrize("limit", [0.9, 0.5, 0.2])
def test_random_policies_keep_the_budget(limit: float) -> None:
    pricing = Pricing(COSTING, parse_budget("flops 0.5").quantity)
    match = Match(SHAPE, pricing.share, limit, lambda policy: 0.0)
    found = [at_random(match, seed) for seed in range(4)]
    assert all(isinstance(each, Entrant) and match.fits(each.policy) for each in found)
    assert found == [at_random(match, seed) for seed in range(4)]
    assert len({each.policy for each in found if isinstance(each, Entrant)}) == 4


def test_times_are_fitted_to_what_was_measured() -> None:
    """A machine whose times are known: they are found again."""
    true = np.array([1.5, 2.0, 1e-4, 2e-4, 0.0, 0.0])

    def timed(policy: SkipPolicy) -> Timed:
        numbers = COSTING.of(policy)
        ttft, tpot = (0.01 + float(phase_of(numbers, p) @ true) for p in ("prefill", "decode"))
        return Timed(policy, (ttft,) * 3, (tpot,) * 3)

    policies = probes(SHAPE)
    latency = fit(COSTING, [[timed(SkipPolicy()), *map(timed, policies)]])
    assert max(latency.errors.values()) < 1e-6
    other = SkipPolicy.preset("every_nth_block", interval=2)
    for name in ("ttft 1.2x", "tpot 1.2x"):
        pricing = Pricing(COSTING, parse_budget(name).quantity, latency)
        field = name.split()[0]
        share = getattr(timed(other), field)[0] / getattr(timed(SkipPolicy()), field)[0]
        assert pricing.share(other) == pytest.approx(share, rel=1e-6)
    again = Timed.from_dict(timed(other).to_dict())
    assert again.policy == other and again.ttft == timed(other).ttft
    assert len(PARTS) == len(true)
