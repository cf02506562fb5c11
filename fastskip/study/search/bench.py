"""How far policies move a model's answers and how long they take, each measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastskip.fingerprints import model_fingerprint
from fastskip.loading import plan_of
from fastskip.machine import machine_key
from fastskip.plan.costs import Ceilings
from fastskip.plan.single_call import SingleCall
from fastskip.policy import SkipPolicy
from fastskip.study.calls import placed
from fastskip.study.evaluation.comparison import prompt_sizes
from fastskip.study.evaluation.exam import Exam
from fastskip.study.fingerprints import combined
from fastskip.study.search.budget import Quantity
from fastskip.study.search.calibrating import AnswerShift, Calibrator
from fastskip.study.search.costing import Costing
from fastskip.study.search.latency import Timed, fit, probes, time_in_turn
from fastskip.study.search.measurement_cache import MeasurementCache, key_of
from fastskip.study.search.pricing import Pricing
from fastskip.study.search.settings import SearchSettings, Watcher


class Bench:
    """Measures policies of one model; measurements stored in the folder are reused."""

    def __init__(
        self,
        model: Any,
        calibration: Exam,
        typical: Any,
        ceilings: Ceilings,
        settings: SearchSettings,
        folder: Path | None,
        watcher: Watcher,
    ) -> None:
        """Measures nothing yet.

        Args:
            model: a prepared one.
            calibration: the items on which policies are compared with the dense model.
            typical: the inputs of one prompt, for which costs and times are taken.
            ceilings: of the machine.
            settings: how much is done.
            folder: where measurements are stored.
            watcher: receives progress.
        """
        self.model, self.calibration = model, calibration
        self.shape = plan_of(model).shape
        self._typical, self._settings, self._watcher = placed(typical, model), settings, watcher
        workload = SingleCall(*prompt_sizes(typical, model.config), settings.new_tokens)
        self.costing = Costing(self.shape, workload, ceilings)
        self.model_print = model_fingerprint(model)
        self._kept = MeasurementCache(folder)
        self._base = combined(
            self.model_print,
            calibration.fingerprint,
            calibration.new_tokens,
            len(calibration),
            str(model.device),
        )
        self._calibrator: Calibrator | None = None

    def moved(self, policy: SkipPolicy) -> AnswerShift:
        """How far a policy moves the calibration set's answers."""

        def measure() -> Any:
            if self._calibrator is None:
                self._calibrator = Calibrator(self.model, self.calibration)
            return asdict(self._calibrator.moved(policy))

        return AnswerShift(**self._kept.value(key_of(self._base, "moved", policy), measure))

    def divergence(self, policy: SkipPolicy) -> float:
        """The KL divergence from the dense model, in nats per answer token."""
        return self.moved(policy).kl

    def loss(self, policy: SkipPolicy) -> float:
        """Negative log likelihood of the dense model's answers, in nats per answer token."""
        return self.moved(policy).loss

    def timed(self, what: str, policies: Sequence[SkipPolicy]) -> list[Timed]:
        """Times the dense model and these policies, interleaved, on this machine."""
        rounds, new = self._settings.rounds, self._settings.new_tokens

        def measure() -> Any:
            self._watcher.on_stage(f"timing {what}", rounds)
            found = time_in_turn(
                self.model, policies, self._typical, new, rounds, self._watcher.on_step
            )
            return [each.to_dict() for each in found]

        named = combined([each.to_dict() for each in policies], self.costing.workload.to_dict())
        here = machine_key(self.model.dtype, self.model.device)
        key = key_of(self._base, f"timed {what} {named} {rounds} on {here}")
        return [Timed.from_dict(each) for each in self._kept.value(key, measure)]

    def pricing(self, quantity: Quantity, more: Sequence[Sequence[Timed]] = ()) -> Pricing:
        """Prices in a budget's quantity; times are fitted to the probes and to `more`."""
        if quantity is Quantity.FLOPS:
            return Pricing(self.costing, quantity)
        groups = [self.timed("probes", probes(self.shape)), *more]
        return Pricing(self.costing, quantity, fit(self.costing, groups))
