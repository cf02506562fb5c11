"""What is timed: Hugging Face's model, our dense one and policies, all on one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
import transformers
from transformers import CompileConfig

from fastskip.families import check_config
from fastskip.loading import apply_, load_model, load_unprepared, plan_of, set_policy
from fastskip.plan import SkipPlan
from fastskip.policy import SkipPolicy
from fastskip.study.bench.errors import BenchError

DENSE = "dense"
HF = "Hugging Face"
HF_COMPILED = "Hugging Face, static cache + compile"


class Source(StrEnum):
    """Which `generate` runs."""

    HF = "hf"
    HF_COMPILED = "hf-compiled"
    FASTSKIP = "fastskip"


@dataclass(frozen=True, slots=True)
class Models:
    """A checkpoint under our decoder and, optionally, under Hugging Face's.

    Both share their parameters, so the second one takes no extra memory. Our decoder merges the q,
    k, v weights (and gate and up) into one matrix; Hugging Face's multiplies by slices of it.
    """

    ours: Any
    hf: Any = None

    @classmethod
    def load(cls, path: str, *, dtype: str = "auto", device: Any = None, hf: bool = True) -> Models:
        """Load a checkpoint from a folder or the hub.

        Raises:
            BenchError: Hugging Face cannot read the weights, such as those of a sparse checkpoint.
            ValueError: weights are missing.
            UnsupportedModelError: fastskip does not support the model.
            OSError: no such checkpoint.
        """
        if not hf:
            return cls(load_model(path, "dense", dtype=dtype, device=device))
        config = transformers.AutoConfig.from_pretrained(path)
        check_config(config)
        try:
            model = load_unprepared(path, config, device or "cpu", dtype=dtype)
        except OSError as error:
            raise BenchError(
                f"{path}: Hugging Face cannot read its weights ({error}); allowed: an ordinary "
                "checkpoint, or a benchmark without Hugging Face"
            ) from error
        return cls.sharing(model)

    @classmethod
    def sharing(cls, hf: Any, **options: Any) -> Models:
        """From a Hugging Face model, sharing its weights; `options` go to `fastskip.apply_`."""
        hf.eval()
        # A memo that lists the parameters as already copied makes deepcopy share them.
        shared = {id(parameter): parameter for parameter in hf.parameters()}
        return cls(apply_(copy.deepcopy(hf, shared), **options), hf)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run the model; without a policy, Hugging Face's own."""

    label: str
    source: Source
    policy: SkipPolicy | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def model(self, models: Models) -> Any:
        """The model that it runs, under its policy."""
        if self.policy is None:
            return models.hf
        return set_policy(models.ours, self.policy)

    def plan(self, models: Models) -> SkipPlan:
        """The plan of what it computes; for Hugging Face's model, the dense plan.

        Raises:
            PolicyError: the policy does not fit the model.
            UnsupportedModelError: the device cannot run it.
        """
        return plan_of(set_policy(models.ours, self.policy or SkipPolicy()))

    @property
    def has_ideal(self) -> bool:
        """Whether floors bound its gain: they do not model the launches that arrangements save."""
        return self.policy is not None and not self.policy.arrangements


def contenders_of(
    models: Models, policies: Sequence[tuple[str, SkipPolicy]], *, is_compiled: bool
) -> tuple[Contender, ...]:
    """Hugging Face's variants, then our dense model, then the policies.

    Raises:
        BenchError: two contenders have the same label.
    """
    labels = [HF, HF_COMPILED, DENSE, *(label for label, _ in policies)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        allowed = f"each label once ({DENSE!r} is built in)"
        raise BenchError(f"policies: {twice[0]!r} appears twice; allowed: {allowed}")
    found = []
    if models.hf is not None:
        found.append(Contender(HF, Source.HF))
        if is_compiled:
            found.append(
                Contender(HF_COMPILED, Source.HF_COMPILED, options=_compiling(models.hf.device))
            )
    found.append(Contender(DENSE, Source.FASTSKIP, SkipPolicy(name=DENSE)))
    for label, policy in policies:
        # The fit of a policy's provenance to the model is checked once, not in every round.
        found.append(Contender(label, Source.FASTSKIP, replace(policy, provenance={})))
    return tuple(found)


def _compiling(device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {"cache_implementation": "static"}
    if device.type != "cuda":
        # By default Hugging Face compiles on accelerators only.
        options["compile_config"] = CompileConfig()
        options["compile_config"]._compile_all_devices = True
    return options
