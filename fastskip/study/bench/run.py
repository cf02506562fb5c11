"""Check all contenders, time them interleaved, then compare with our dense model and the floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from fastskip.fingerprints import model_fingerprint
from fastskip.intervals import Spread, paired_speedup, quartiles
from fastskip.loading import plan_of, set_policy
from fastskip.plan import SkipPlan
from fastskip.plan.costs import Ceilings, GenerationCost, Planned, floor_seconds, generation_cost
from fastskip.plan.mixed_cost import mixed_cost
from fastskip.policy import SkipPolicy
from fastskip.policy_fit import check_fit
from fastskip.study.bench.contenders import (
    DENSE,
    Contender,
    Models,
    contenders_of,
)
from fastskip.study.bench.errors import BenchError
from fastskip.study.bench.first_calls import agreements_of, first_call
from fastskip.study.bench.results import (
    BenchResult,
    ContenderResult,
    Phases,
    Speedup,
    Times,
)
from fastskip.study.bench.samples import Inputs, Sample, sample
from fastskip.study.bench.workload import Workload, workload_of
from fastskip.study.calls import placed
from fastskip.study.counts import check_counts
from fastskip.study.observed_rates import Rates
from fastskip.study.provenance import circumstances
from fastskip.timing import LEAST_ROUNDS, endless, race


def bench(
    models: Models,
    policies: Sequence[tuple[str, SkipPolicy]],
    inputs: Inputs,
    ceilings: Ceilings,
    *,
    new_tokens: int = 32,
    rounds: int = 9,
    budget_s: float = math.inf,
    is_compiled: bool = False,
    on_call: Callable[[str], object] = lambda label: None,
) -> BenchResult:
    """Time Hugging Face, our dense model and each policy on the same inputs, interleaved.

    Every contender first makes one untimed call, in which our dense model must produce Hugging
    Face's greedy tokens: all of them in float32 and float64.

    Args:
        models: on the device to measure; our model's current policy is restored at the end.
        policies: labels and policies.
        inputs: prompts with equal images, as from `workload.synthetic_inputs` or a processor; for
            prompts of different lengths, as from `workload.padded`.
        ceilings: of this device.
        new_tokens: how many tokens each prompt generates; no token ends an answer early.
        rounds: how often each contender is timed.
        budget_s: stop after as many rounds as fit into this time, but no fewer than three.
        is_compiled: whether Hugging Face also runs with a static cache and `torch.compile`; if that
            fails, it is left out, with the reason.
        on_call: called with a label before its first call and before each timed one.
    Raises:
        BenchError: a number is too small, a label appears twice, or our dense model's tokens do not
            match Hugging Face's.
        PolicyError: a policy does not fit the model.
        UnsupportedModelError: the device cannot run a policy.
    Warns:
        PolicyFitWarning: a policy was made for another model.
    """
    check_counts(BenchError, new_tokens=(new_tokens, 2), rounds=(rounds, LEAST_ROUNDS))
    every = contenders_of(models, policies, is_compiled=is_compiled)
    before = plan_of(models.ours).policy
    given = placed(inputs, models.ours)
    load = workload_of(given, models.ours.config, new_tokens)
    for _, policy in policies:
        check_fit(models.ours, policy)
    try:
        # Fail on policies that do not fit the model before spending time.
        plans = {each.label: each.plan(models) for each in every}
        with endless(models.ours), endless(models.hf or models.ours):
            firsts = {}
            for each in every:
                on_call(each.label)
                firsts[each.label] = first_call(each, models, plans[each.label], given, new_tokens)
            agreements = agreements_of(every, firsts, models.ours.dtype)
            timed = {each.label: each for each in every if firsts[each.label].left_out is None}

            def run(label: str) -> Sample:
                on_call(label)
                return sample(timed[label], models, given, new_tokens)

            threads = torch.get_num_threads()
            runs = race(
                list(timed),
                run,
                threads=[threads],
                rounds=rounds,
                budget_s=budget_s,
                on_round=lambda: None,
            )
    finally:
        set_policy(models.ours, before)
    made = {label: runs[label, threads] for label in timed}
    costs = {label: cost_of(plan, firsts[label].rates, load) for label, plan in plans.items()}
    return BenchResult(
        circumstances=circumstances(models.ours)
        | {"model_fingerprint": model_fingerprint(models.ours)},
        workload=load,
        rounds=len(made[DENSE]),
        ceilings=ceilings,
        contenders=tuple(
            replace(
                _contest(each, made, costs, load, ceilings),
                policy=_document(each, policies),
                peak_bytes=firsts[each.label].peak_bytes,
                kv_bytes=sum(
                    plans[each.label].kv_bytes(load.n_image, n_text, new_tokens - 1)
                    for n_text in load.each_text
                ),
                as_hf=agreements.get(each.label),
                left_out=firsts[each.label].left_out,
            )
            for each in every
        ),
    )


def cost_of(plan: SkipPlan, rates: tuple[Rates, Rates] | None, load: Workload) -> GenerationCost:
    """The cost of a plan; routers count at the rates observed in prefill and decode steps."""

    def at(planned: Planned) -> GenerationCost:
        def cost(n_text: int) -> GenerationCost:
            before = min(load.text_before, n_text)
            return generation_cost(
                planned, load.n_image, n_text, load.new_tokens, load.batch, text_before=before
            )

        if not load.texts:
            return cost(load.n_text)
        costs = {n_text: cost(n_text) for n_text in set(load.texts)}
        return mixed_cost([costs[n_text] for n_text in load.texts])

    if rates is None:
        return at(plan)
    prompt, steps = (at(plan.expected(each)) for each in rates)
    return GenerationCost(prompt.prefill, steps.decode)


def _contest(
    contender: Contender,
    made: Mapping[str, Sequence[Sample]],
    costs: Mapping[str, GenerationCost],
    load: Workload,
    ceilings: Ceilings,
) -> ContenderResult:
    cost = costs[contender.label]
    floor = _floor(cost, ceilings)
    found = ContenderResult(contender.label, contender.source, flops=cost.flops, floor_s=floor)
    if contender.label not in made:
        return found
    own, dense = made[contender.label], made[DENSE]

    def over(quantity: str) -> Spread:
        base, mine = ([getattr(each, quantity) for each in runs] for runs in (dense, own))
        return paired_speedup(base, mine)

    ideal = None
    if contender.has_ideal:
        ideal = ideal_share(
            Phases(over("prefill").median, over("decode").median),
            _floor(costs[DENSE], ceilings),
            floor,
        )
    is_dense = contender.label == DENSE
    return replace(
        found,
        times=Times(
            **{f"{name}_s": quartiles([getattr(each, name) for each in own]) for name in _NAMES}
        ),
        tokens_per_s=load.batch * load.new_tokens / median(each.call for each in own),
        ideal_share=ideal,
        speedup=None if is_dense else Speedup(over("ttft"), over("tpot")),
    )


_NAMES = ("ttft", "prefill", "tpot", "decode")


def ideal_share(speedup: Phases, dense_floor: Phases, own_floor: Phases) -> Phases:
    """Achieved over promised speed-up, per phase: speed-up / (dense floor / own floor)."""
    return Phases(
        speedup.prefill * own_floor.prefill / dense_floor.prefill,
        speedup.decode * own_floor.decode / dense_floor.decode,
    )


def _floor(cost: GenerationCost, ceilings: Ceilings) -> Phases:
    return Phases(
        floor_seconds(cost.prefill, ceilings),
        floor_seconds(cost.decode, ceilings) / cost.decode.steps,
    )


def _document(
    contender: Contender, policies: Sequence[tuple[str, SkipPolicy]]
) -> dict[str, Any] | None:
    """The policy as given, with its provenance."""
    if contender.policy is None:
        return None
    return dict(policies).get(contender.label, contender.policy).to_dict()
