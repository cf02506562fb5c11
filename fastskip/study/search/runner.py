"""The whole search: measure, solve, better, hold to others, judge, recommend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastskip.costs import Ceilings
from fastskip.loading import plan_of, set_policy
from fastskip.policy import SkipPolicy
from fastskip.study.comparison import prompt_sizes
from fastskip.study.evaluation import Exam
from fastskip.study.fingerprints import combined, items_fingerprint, model_fingerprint
from fastskip.study.judging import Judgement, JudgementFile, judge
from fastskip.study.provenance import circumstances
from fastskip.study.samples import placed
from fastskip.study.search import conclusion, sensitivity, solver
from fastskip.study.search.block_influence import block_influence
from fastskip.study.search.budget import Budget, Quantity, impossible
from fastskip.study.search.calibrating import Calibrator, Moved
from fastskip.study.search.changes import choices_of
from fastskip.study.search.costing import Costing, Workload
from fastskip.study.search.kept import FILE, Kept, key_of
from fastskip.study.search.latency import Timed, fit, probes, time_in_turn
from fastskip.study.search.matching import Entrant, LeftOut, Match, parted
from fastskip.study.search.peers import Known, peers
from fastskip.study.search.pricing import Pricing
from fastskip.study.search.refine import SLACK, Refined, Refinery, policy_for
from fastskip.study.search.result import Comparison, Found, SearchResult, front
from fastskip.study.search.routers import routed
from fastskip.study.search.sensitivity import Sensitivities
from fastskip.study.search.solver import Offer
from fastskip.study.search.uniform import at_random, uniform
from fastskip.study.search.visual_contribution import FROZEN
from fastskip.study.similarity import LayerSimilarity

JUDGEMENTS = "judgements.jsonl"
_CORRECTIONS = 3
"""How often a policy that misses a time budget as measured is sought anew."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How much is done.

    Attributes:
        seed: of the refinement and the random policies.
        tries: policies measured to better the solver's, at the budget; half as many elsewhere.
        points: budgets between dense and the one asked for that are solved too.
        minutes: of the refinement at the most; it then ends early, and the result says so.
        new_tokens: of the workload that costs and times are of.
        rounds: timed runs of each policy.
        randoms: random policies.
        wirings: whether parallel blocks and pairs are measured too.
        routers: whether calibrated routers are held to the find.
    """

    seed: int = 0
    tries: int = 120
    points: int = 3
    minutes: float | None = None
    new_tokens: int = 16
    rounds: int = 5
    randoms: int = 3
    wirings: bool = True
    routers: bool = True

    def __post_init__(self) -> None:
        least = {"seed": 0, "tries": 1, "points": 0, "new_tokens": 2, "rounds": 1, "randoms": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: {low} or more")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: {self.minutes}; allowed: more than 0")


@dataclass(frozen=True)
class Watcher:
    """Who is told how far a search is: `on_stage` of a stage and its steps, `on_step` of each."""

    on_stage: Callable[[str, int | None], object] = lambda stage, steps: None
    on_step: Callable[[], object] = lambda: None


class Search:
    """One model, one budget, items to calibrate on and items to judge by."""

    def __init__(
        self,
        model: Any,
        budget: Budget,
        calibration: Exam,
        held_out: Exam,
        ceilings: Ceilings,
        *,
        similarity: Sequence[LayerSimilarity] = (),
        settings: SearchSettings | None = None,
        folder: Path | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Takes things as they are; nothing is measured yet.

        Args:
            model: a prepared one; it is left with the policy that it came with.
            budget: what a policy may cost.
            calibration: items that the search sees.
            held_out: items that it does not; the first one is what costs and times are of.
            ceilings: of the machine.
            similarity: of the model's hidden states (`fastskip.study.similarity`), if measured.
            settings: how much is done.
            folder: where what is measured is kept, so that a search that was cut off goes on.
            watcher: who is told how far it is.
        """
        solver.require()
        self.model, self.budget, self.held_out = model, budget, held_out
        self._exam, self._similarity = calibration, tuple(similarity)
        self.settings, self._watcher = settings or SearchSettings(), watcher or Watcher()
        self._folder = folder
        self._kept = Kept(None if folder is None else folder / FILE)
        self._shape = plan_of(model).shape
        self._inputs = placed(held_out.single(0), model)
        sizes = prompt_sizes(held_out.single(0), model.config)
        workload = Workload(*sizes, self.settings.new_tokens)
        self._costing = Costing(self._shape, workload, ceilings)
        self._model_print = model_fingerprint(model)
        items = items_fingerprint(calibration.items)
        self._base = combined(
            self._model_print, items, calibration.new_tokens, len(calibration), str(model.device)
        )
        self._calibrator: Calibrator | None = None

    def run(self) -> SearchResult:
        """Search, and write what was found if there is a folder.

        Raises:
            BudgetError: the budget cannot be kept; says what can.
            ItemError: an item cannot be used.
        """
        before = plan_of(self.model).policy
        try:
            result = self._run()
        finally:
            set_policy(self.model, before)
        return result if self._folder is None else result.write(self._folder)

    def _run(self) -> SearchResult:
        pricing = self._pricing(())
        self._check_possible(pricing)
        sensitivities = self._sensitivities(pricing)
        pricing, refined = self._refined(sensitivities)
        limit = self._limit(pricing)
        match = Match(self._shape, pricing.share, limit, self.divergence)
        entrants, left_out = self._entrants(match, pricing, sensitivities)
        candidates, judged = self._judged(pricing, limit, refined, entrants)
        return self._concluded(pricing, sensitivities, refined, candidates, judged, left_out)

    # what a policy does to the answers

    def moved(self, policy: SkipPolicy) -> Moved:
        """How far a policy moves the calibration set's answers."""

        def measure() -> Any:
            return asdict(self._answers().moved(policy))

        return Moved(**self._kept.value(key_of(self._base, "moved", policy), measure))

    def divergence(self, policy: SkipPolicy) -> float:
        """The same in nats an answer token."""
        return self.moved(policy).kl

    def _answers(self) -> Calibrator:
        if self._calibrator is None:
            self._calibrator = Calibrator(self.model, self._exam)
        return self._calibrator

    # what it costs

    def _pricing(self, found: Sequence[Sequence[Timed]]) -> Pricing:
        latency = None
        if self.budget.quantity is not Quantity.FLOPS:
            own = probes(self._shape)
            latency = fit(self._costing, [self._timed("probes", own), *found])
        return Pricing(self._costing, self.budget.quantity, latency)

    def _timed(self, what: str, policies: Sequence[SkipPolicy]) -> list[Timed]:
        """Policies in turn with dense."""
        rounds, new = self.settings.rounds, self.settings.new_tokens

        def measure() -> Any:
            self._watcher.on_stage(f"timing {what}", rounds)
            found = time_in_turn(
                self.model, policies, self._inputs, new, rounds, self._watcher.on_step
            )
            return [each.to_dict() for each in found]

        w, names = self._costing.workload, [each.to_dict() for each in policies]
        key = key_of(self._base, f"timed {what} {w} {rounds} {combined(names)}")
        return [Timed.from_dict(each) for each in self._kept.value(key, measure)]

    def _limit(self, pricing: Pricing) -> float:
        return self.budget.limit(pricing.dense_s)

    def _check_possible(self, pricing: Pricing) -> None:
        """Before the long part: whether skipping everything would keep the budget."""
        offers = [
            Offer(layer, choice, 0.0, pricing.saved(layer, choice))
            for layer in range(self._shape.depth)
            for choice in choices_of(
                sensitivity.changes_of(layer, self._shape.depth, self._shape.classes),
                self._shape.classes,
            )
        ]
        least = 1 - solver.most_saved(offers, self._shape.depth)
        if least > self._limit(pricing) + SLACK:
            raise impossible(self.budget, max(least, 1e-9), pricing.dense_s)

    # what single changes cost in answers, and what the solver makes of it

    def _sensitivities(self, pricing: Pricing) -> Sensitivities:
        wirings = self.settings.wirings
        steps = sensitivity.count(self._shape, wirings=wirings)
        self._watcher.on_stage("sensitivity", steps)
        return sensitivity.measure(
            self._shape,
            self.divergence,
            lambda layer, change: pricing.saved(layer, (change,)),
            self._similarity,
            wirings=wirings,
            on_cell=self._watcher.on_step,
        )

    def _offers(self, sensitivities: Sensitivities, pricing: Pricing) -> list[Offer]:
        classes, depth = self._shape.classes, self._shape.depth
        every = [
            Offer(layer, choice, sensitivities.kl(layer, choice), pricing.saved(layer, choice))
            for layer in range(depth)
            for choice in choices_of(sensitivities.changes(layer), classes)
        ]
        return solver.worthwhile(every, depth)

    def _refined(self, sensitivities: Sensitivities) -> tuple[Pricing, dict[str, Refined]]:
        """By name: the best at the budget, and at milder ones; times are then measured, and where
        the budget is missed the fit learns from it and the search goes on."""
        more: list[list[Timed]] = []
        for number in range(_CORRECTIONS + 1):
            pricing = self._pricing(more)
            limit = self._limit(pricing)
            name = conclusion.FOUND
            found = self._refine(sensitivities, pricing, {name: limit}, self.settings.tries)
            if pricing.latency is None or name not in found or number == _CORRECTIONS:
                break
            timed = self._timed(f"find {number}", [found[name].policy])
            dense, own = timed
            phase = "prefill" if self.budget.quantity is Quantity.TTFT else "decode"
            if own.saved(dense, phase) >= (1 - limit) * pricing.dense_s:  # type: ignore[operator]
                break
            more.append(timed)
        points = self.settings.points
        milder = {
            f"{conclusion.FOUND} at {share:.2f}": share
            for share in (limit + (1 - limit) * n / (points + 1) for n in range(1, points + 1))
        }
        found |= self._refine(sensitivities, pricing, milder, max(1, self.settings.tries // 2))
        return pricing, found

    def _refine(
        self,
        sensitivities: Sensitivities,
        pricing: Pricing,
        limits: Mapping[str, float],
        tries: int,
    ) -> dict[str, Refined]:
        offers = self._offers(sensitivities, pricing)
        minutes, began = self.settings.minutes, time.monotonic()
        found = {}
        for place, (name, limit) in enumerate(limits.items()):
            self._watcher.on_stage(f"refining: {name}", tries)
            allowed = None if minutes is None else 60 * minutes * (place + 1) / len(limits)
            refinery = Refinery(
                self._shape.depth,
                self.divergence,
                pricing.share,
                lambda allowed=allowed: (  # type: ignore[misc]
                    allowed is not None and time.monotonic() - began > allowed
                ),
                self._watcher.on_step,
            )
            best = refinery.refine(offers, limit, tries, self.settings.seed + place)
            if best is not None:
                found[name] = best
        return found

    # who it is held to

    def _entrants(
        self, match: Match, pricing: Pricing, sensitivities: Sensitivities
    ) -> tuple[list[Entrant], list[LeftOut]]:
        self._watcher.on_stage("uniform intervals, random policies, peers", None)
        seed, count = self.settings.seed, self.settings.randoms
        known = Known(
            block_influence(self._similarity),
            dict(sensitivities.of(FROZEN)),
            lambda policy: self.moved(policy).loss,
        )
        found: list[Entrant | LeftOut] = []
        for each in (
            *uniform(match),
            *(at_random(match, seed + n) for n in range(count)),
            *peers(match, known),
            *self._routers(pricing, match.limit),
        ):
            found.append(each)
            self._watcher.on_step()
        return parted(found)

    def _routers(self, pricing: Pricing, limit: float) -> Iterator[Entrant | LeftOut]:
        if not self.settings.routers:
            return
        runtime = plan_of(self.model)
        samples = [self._exam.inputs(number) for number in range(len(self._exam))]
        yield from routed(
            self.model,
            samples,
            pricing.share,
            limit,
            runtime.shape.depth,
            runtime.shape.has_images,
            self._exam.new_tokens,
        )

    # held-out items

    def _judged(
        self,
        pricing: Pricing,
        limit: float,
        refined: Mapping[str, Refined],
        entrants: Sequence[Entrant],
    ) -> tuple[list[Found], tuple[Judgement, ...]]:
        every = [
            *(
                Entrant(name, "search", replace(each.policy, name=name))
                for name, each in refined.items()
            ),
            *self._unrefined(refined),
            *entrants,
        ]
        named = [(each.name, each.policy) for each in every]
        self._watcher.on_stage("judging", (1 + len(named)) * len(self.held_out))
        judged = judge(
            self.model,
            named,
            self.held_out,
            new_tokens=self.settings.new_tokens,
            rounds=self.settings.rounds,
            kept=None if self._folder is None else JudgementFile(self._folder / JUDGEMENTS),
            on_batch=self._watcher.on_step,
        )
        dense = judged[0]
        found = []
        for entrant, own in zip(
            [Entrant("dense", "dense", SkipPolicy()), *every], judged, strict=True
        ):
            rates = dict(enumerate(entrant.rates)) or None
            cost = pricing.share(entrant.policy, rates)
            tokens, kl = own.agreement.means
            found.append(
                Found(
                    name=entrant.name,
                    source=entrant.source,
                    policy=entrant.policy,
                    cost=cost,
                    flops=pricing.flops(entrant.policy, rates),
                    ttft_s=None if own.speed is None else own.speed.ttft_s,
                    tpot_s=None if own.speed is None else own.speed.tpot_s,
                    calibration_kl=self.divergence(entrant.policy),
                    score=own.evaluation.estimate(),
                    change=own.change(dense),
                    tokens=tokens,
                    kl=kl,
                    keeps_budget=self._keeps(own, dense, cost, limit),
                )
            )
        return _with_front(found, self.budget.quantity), judged

    def _unrefined(self, refined: Mapping[str, Refined]) -> list[Entrant]:
        own = refined.get(conclusion.FOUND)
        if own is None or own.first == own.solution:
            return []
        name = "search, solver alone"
        return [Entrant(name, "search", policy_for(own.first, name))]

    def _keeps(self, own: Judgement, dense: Judgement, cost: float, limit: float) -> bool:
        if self.budget.quantity is Quantity.FLOPS or own.speed is None or dense.speed is None:
            return cost <= limit + SLACK
        name = "ttft_s" if self.budget.quantity is Quantity.TTFT else "tpot_s"
        taken, base = getattr(own.speed, name), getattr(dense.speed, name)
        most = self.budget.most_s
        return bool(taken <= (limit * base if most is None else most))

    def _concluded(
        self,
        pricing: Pricing,
        sensitivities: Sensitivities,
        refined: Mapping[str, Refined],
        candidates: Sequence[Found],
        judged: Sequence[Judgement],
        left_out: Sequence[LeftOut],
    ) -> SearchResult:
        best = conclusion.recommended(candidates)
        by_name = {each.label: each for each in judged}
        comparisons = []
        if conclusion.FOUND in by_name:
            own = by_name[conclusion.FOUND].evaluation
            comparisons = [
                Comparison(each.name, each.source, own.minus(by_name[each.name].evaluation))
                for each in candidates
                if each.source not in ("dense", "search")
            ]
        items = len(self.held_out.items)
        text = conclusion.told(candidates, best, comparisons, items, self.budget.text)
        cut = any(each.is_cut_short for each in refined.values())
        about = {
            **circumstances(self.model),
            "model_fingerprint": self._model_print,
            "items_fingerprint": items_fingerprint(self.held_out.items),
            "calibration_fingerprint": items_fingerprint(self._exam.items),
        }
        return SearchResult(
            budget=self.budget.to_dict(),
            circumstances=about,
            workload=self._costing.workload.to_dict(),
            settings={
                **asdict(self.settings),
                "calibration_items": len(self._exam.items),
                "held_out_items": items,
                "is_cut_short": cut,
                "tried": {name: each.tried for name, each in refined.items()},
            },
            sensitivity=sensitivities.found,
            candidates=tuple(
                replace(each, is_recommended=best is not None and each.name == best.name)
                for each in candidates
            ),
            comparisons=tuple(comparisons),
            left_out=tuple(left_out),
            recommended=None if best is None else best.name,
            text=text,
            latency=None if pricing.latency is None else pricing.latency.to_dict(),
            made_for={
                "model": about["model"],
                "fingerprint": self._model_print,
                "depth": self._shape.depth,
                "hidden_size": self._shape.hidden_size,
                "dtype": about["dtype"],
            },
        )


def _with_front(found: Sequence[Found], quantity: Quantity) -> list[Found]:
    """Marks what no other one beats in both cost and score; times as measured."""

    def cost(each: Found) -> float:
        measured = {Quantity.TTFT: each.ttft_s, Quantity.TPOT: each.tpot_s}.get(quantity)
        return each.cost if measured is None else measured

    marks = front([(cost(each), each.score.mean) for each in found])
    return [replace(each, is_on_front=mark) for each, mark in zip(found, marks, strict=True)]
