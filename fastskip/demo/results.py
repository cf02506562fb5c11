"""The demo's results as data: for the tables, the plots and the JSON file."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from fastskip import __version__, machine
from fastskip.demo.policies import DENSE, HF, Candidate
from fastskip.demo.scenes import Question, Scene
from fastskip.intervals import wilson
from fastskip.plan import SkipPlan
from fastskip.plan.costs import Ceilings, Cost, floor_seconds
from fastskip.plan.single_call import SingleCall
from fastskip.timing import Phase, Runs, Timing, best
from fastskip.wording import dtype_name

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were exactly right."""

    right: int = 0
    asked: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.right + other.right, self.asked + other.asked)

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        found = wilson(self.right, self.asked)
        return found.low, found.high

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share, "interval": list(self.interval)}


@dataclass(frozen=True, slots=True)
class Quality:
    """Scores of questions and of captions."""

    questions: Score = Score()
    captions: Score = Score()

    def __add__(self, other: "Quality") -> "Quality":
        return Quality(self.questions + other.questions, self.captions + other.captions)


@dataclass(frozen=True, slots=True)
class Speed:
    """One phase of one candidate; `ideal` is None where floors cannot say what it gains."""

    timing: Timing
    vs_hf: float
    vs_dense: float
    floor_s: float
    ideal: float | None

    @property
    def share_of_ideal(self) -> float | None:
        return None if self.ideal is None else self.vs_dense / self.ideal

    def to_dict(self) -> dict[str, Any]:
        return {
            "median_ms": 1e3 * self.timing.seconds,
            "samples_ms": [1e3 * sample for sample in self.timing.samples],
            "threads": self.timing.threads,
            "vs_hf": self.vs_hf,
            "vs_dense": self.vs_dense,
            "floor_ms": 1e3 * self.floor_s,
            "ideal": self.ideal,
            "share_of_ideal": self.share_of_ideal,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """All results of one candidate. Hugging Face's plan is the dense one."""

    candidate: Candidate
    plan: SkipPlan
    quality: Quality
    prefill: Speed
    decode: Speed

    def to_dict(self) -> dict[str, Any]:
        policy = self.candidate.policy
        return {
            "label": self.candidate.label,
            "policy": None if policy is None else policy.to_dict(),
            "questions": self.quality.questions.to_dict(),
            "captions": self.quality.captions.to_dict(),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Example:
    """A picture, a question about it, and what some candidates answer, by label."""

    scene: Scene
    question: Question
    answers: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "scene": self.scene.key,
            "question": self.question.text,
            "truth": self.question.answer,
            "answers": self.answers,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All results of one run of the demo."""

    model: dict[str, Any]
    environment: dict[str, Any]
    workload: SingleCall
    ceilings: dict[int, Ceilings]
    agreement: Score
    examples: tuple[Example, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `agreement` counts prompts that dense answers like Hugging Face."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "environment": self.environment,
            "workload": self.workload.to_dict(),
            "ceilings": {str(count): asdict(each) for count, each in self.ceilings.items()},
            "agreement": self.agreement.to_dict(),
            "examples": [example.to_dict() for example in self.examples],
            "rows": [row.to_dict() for row in self.rows],
        }

    @property
    def footer(self) -> str:
        """Where the numbers come from, in one line."""
        found = self.environment
        return (
            f"{found['processor']}, {found['threads']} threads at most, {found['dtype']}; torch "
            f"{found['torch']}, transformers {found['transformers']}, fastskip {found['fastskip']}"
        )


def speed(
    candidate: Candidate,
    phase: Phase,
    runs: Runs,
    plans: dict[str, SkipPlan],
    workload: SingleCall,
    ceilings: dict[int, Ceilings],
) -> Speed:
    """The measured time and gains, with floors at the same number of threads."""
    timing = best(runs, candidate.label, phase)
    hf, dense = (best(runs, each.label, phase).seconds for each in (HF, DENSE))

    def floor(label: str) -> float:
        cost = _cost(plans[label], phase, workload)
        return floor_seconds(cost, ceilings[timing.threads]) / cost.steps

    own = floor(candidate.label)
    has_ideal = candidate is not HF and not candidate.is_arrangement
    return Speed(
        timing,
        vs_hf=hf / timing.seconds,
        vs_dense=dense / timing.seconds,
        floor_s=own,
        ideal=floor(DENSE.label) / own if has_ideal else None,
    )


def _cost(plan: SkipPlan, phase: Phase, call: SingleCall) -> Cost:
    cost = call.cost(plan)
    return cost.prefill if phase == "prefill" else cost.decode


def environment(dtype: torch.dtype) -> dict[str, Any]:
    """The machine and the versions that this runs on."""
    return {
        "processor": machine.device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "fastskip": __version__,
    }
