"""The whole search: measure, solve, refine, match rivals, judge, recommend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastskip.loading import plan_of, set_policy
from fastskip.plan.costs import Ceilings
from fastskip.policy_fit import made_for
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.judging import Judgement, JudgementFile, judge
from fastskip.study.evaluation.metrics import scale_of
from fastskip.study.provenance import circumstances
from fastskip.study.search import conclusion, sensitivity, solver
from fastskip.study.search.bench import Bench
from fastskip.study.search.block_influence import block_influence
from fastskip.study.search.budget import Budget
from fastskip.study.search.judged import (
    candidates_of,
    cheapest,
    comparisons_of,
    entrants_of,
)
from fastskip.study.search.matching import Entrant, LeftOut, Match, parted
from fastskip.study.search.peers import Known, peers
from fastskip.study.search.pricing import Pricing
from fastskip.study.search.result import Found, SearchResult
from fastskip.study.search.routers import routed
from fastskip.study.search.seeking import Seeker, Sought, check_possible
from fastskip.study.search.sensitivity import Sensitivities
from fastskip.study.search.settings import SearchSettings, Watcher
from fastskip.study.search.uniform import at_random, uniform
from fastskip.study.search.visual_contribution import FROZEN
from fastskip.study.similarity import LayerSimilarity

JUDGEMENTS = "judgements.jsonl"


class Search:
    """One model, one budget, items to calibrate on and items to judge on."""

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
        """Measures nothing yet.

        Args:
            model: a prepared one; its policy is restored after the search.
            budget: what a policy may cost.
            calibration: items that the search sees.
            held_out: items that it does not see; costs and times are those of the first one.
            ceilings: of the machine.
            similarity: of the model's hidden states (`fastskip.study.similarity`), if measured.
            settings: how much is done.
            folder: where measurements are stored, so that an interrupted search resumes.
            watcher: receives progress.
        Raises:
            SolverError: scipy is missing.
            ItemError: the first item cannot be used.
            ScaleError: some held-out items are judged by CIDEr and others are not.
        """
        solver.require()
        self._scale = scale_of(item.metric for item in held_out.items)
        self.model, self.budget, self.held_out = model, budget, held_out
        self.settings, self._watcher = settings or SearchSettings(), watcher or Watcher()
        self._similarity, self._folder = tuple(similarity), folder
        self._bench = Bench(
            model,
            calibration,
            held_out.single(0, self.settings.new_tokens),
            ceilings,
            self.settings,
            folder,
            self._watcher,
        )

    def run(self) -> SearchResult:
        """Search, and write the result if there is a folder.

        Raises:
            BudgetError: the budget cannot be met; the message says what can.
            ItemError: an item cannot be used.
        """
        before = plan_of(self.model).policy
        try:
            result = self._run()
        finally:
            set_policy(self.model, before)
        return result if self._folder is None else result.write(self._folder)

    def _run(self) -> SearchResult:
        bench = self._bench
        pricing = bench.pricing(self.budget.quantity)
        check_possible(bench.shape, pricing, self.budget)
        sensitivities = self._sensitivities(pricing)
        seeker = Seeker(bench, self.budget, self.settings, self._watcher)
        sought = seeker.seek(sensitivities)
        entrants, left_out = self._rivals(sought, sensitivities)
        least = cheapest(sought, entrants)
        if least is not None:
            sought = seeker.cheaper(sensitivities, sought, least)
        entrants = [*entrants_of(sought), *entrants]
        judged = self._judged(entrants)
        candidates = candidates_of(bench, self.budget, sought, entrants, judged)
        return self._concluded(sought, sensitivities, candidates, judged, left_out)

    def _sensitivities(self, pricing: Pricing) -> Sensitivities:
        shape = self._bench.shape
        options = {
            "wirings": self.settings.wirings,
            "keeps_answers": self.settings.keeps_answers,
        }
        self._watcher.on_stage("sensitivity", sensitivity.count(shape, **options))
        return sensitivity.measure(
            shape,
            self._bench.divergence,
            lambda layer, change: pricing.saved(layer, (change,)),
            self._similarity,
            **options,
            on_cell=self._watcher.on_step,
        )

    def _rivals(
        self, sought: Sought, sensitivities: Sensitivities
    ) -> tuple[list[Entrant], list[LeftOut]]:
        """The policies that the search's own is compared with at the budget."""
        self._watcher.on_stage("uniform intervals, random policies, peers, routers", None)
        bench, seed = self._bench, self.settings.seed
        match = Match(bench.shape, sought.pricing.share, sought.limit, bench.divergence)
        contribution = dict(sensitivities.of(FROZEN)) if bench.shape.has_images else {}
        known = Known(block_influence(self._similarity), contribution, bench.loss)
        found: list[Entrant | LeftOut] = []

        def every() -> Iterator[Entrant | LeftOut]:
            yield from uniform(match)
            yield from (at_random(match, seed + n) for n in range(self.settings.randoms))
            yield from peers(match, known)
            if self.settings.routers:
                yield from self._routers(sought)

        for each in every():
            found.append(each)
            self._watcher.on_step()
        return parted(found)

    def _routers(self, sought: Sought) -> Iterator[Entrant | LeftOut]:
        calibration = self._bench.calibration
        yield from routed(
            self.model,
            [calibration.inputs(number) for number in range(len(calibration))],
            sought.pricing.share,
            sought.limit,
            calibration.new_tokens,
        )

    def _judged(self, entrants: Sequence[Entrant]) -> tuple[Judgement, ...]:
        self._watcher.on_stage("judging", (1 + len(entrants)) * len(self.held_out))
        return judge(
            self.model,
            [(each.name, each.policy) for each in entrants],
            self.held_out,
            new_tokens=self.settings.new_tokens,
            rounds=self.settings.rounds,
            kept=None if self._folder is None else JudgementFile(self._folder / JUDGEMENTS),
            on_batch=self._watcher.on_step,
        )

    def _concluded(
        self,
        sought: Sought,
        sensitivities: Sensitivities,
        candidates: Sequence[Found],
        judged: Sequence[Judgement],
        left_out: Sequence[LeftOut],
    ) -> SearchResult:
        best = conclusion.recommended(candidates)
        comparisons = comparisons_of(candidates, judged)
        at_less = comparisons_of(candidates, judged, sought.cheaper)
        bench, items = self._bench, len(self.held_out.items)
        latency = sought.pricing.latency
        about = {
            **circumstances(self.model),
            "model_fingerprint": bench.model_print,
            "items_fingerprint": self.held_out.fingerprint,
            "calibration_fingerprint": bench.calibration.fingerprint,
        }
        return SearchResult(
            budget=self.budget.to_dict(),
            circumstances=about,
            workload=bench.costing.workload.to_dict(),
            settings={
                **asdict(self.settings),
                "calibration_items": len(bench.calibration.items),
                "held_out_items": items,
                "is_cut_short": any(each.is_cut_short for each in sought.refined.values()),
                "tried": {name: each.tried for name, each in sought.refined.items()},
            },
            sensitivity=sensitivities.found,
            candidates=tuple(
                replace(each, is_recommended=best is not None and each.name == best.name)
                for each in candidates
            ),
            comparisons=comparisons,
            cheaper=sought.cheaper,
            comparisons_of_cheaper=at_less,
            left_out=tuple(left_out),
            recommended=None if best is None else best.name,
            scale=self._scale,
            text=conclusion.told(
                candidates, best, comparisons, items, self.budget.text, sought.cheaper, at_less
            ),
            latency=None if latency is None else latency.to_dict(),
            made_for=made_for(self.model),
        )
