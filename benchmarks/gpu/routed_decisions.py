"""Whether routed runs are correct: the cell ``routing.decisions``.

Routers must decide on the device what the torch form decides, and logits must be those of the
masked dense computation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fastskip
from benchmarks.gate import faults
from benchmarks.gpu.cells import Setting
from benchmarks.gpu.correctness import Wrong
from benchmarks.gpu.models import tiny_model
from benchmarks.gpu.results import Values
from benchmarks.gpu.routed_policies import GROUPS, KIND_OF, linear, policy_of, router
from benchmarks.shapes import Models, Shape, models, prompts, ragged
from fastskip.generation.guarding import Guarding
from fastskip.ops.bodies import bodies_on
from fastskip.policy import SkipPolicy
from fastskip.wording import dtype_name

NEAR = 0.01
"""The share of score-based decisions that may differ: scores within rounding of the threshold."""
_KV_GROUPS = [("project", "row"), *(("omit", group) for group in GROUPS)]


def decisions(setting: Setting) -> Values:
    """Checks a small model under routers, with early exits, IF nodes and loops."""
    build = partial(tiny_model, device=setting.device.type)
    found: dict[str, Any] = {}
    wrong: list[str] = []
    dtypes = (torch.float32,) if setting.is_tiny else (setting.dtype, torch.float32)
    for dtype in dtypes:
        both = models(build, dtype, setting.device.type, setting.impl)
        policies = _policies(both, setting)
        for guarding in Guarding:
            name = f"{dtype_name(dtype)}, {KIND_OF[guarding]}"
            try:
                if guarding is not Guarding.EARLY_EXIT:
                    bodies_on(setting.device)
            except ValueError as error:  # no CUDA bindings: early exits are checked anyway
                found[name] = str(error)
                continue
            both.ours._fastskip.steps.guarding = guarding
            try:
                own = faults(both, policies)
            finally:
                both.ours._fastskip.steps.guarding = Guarding.EARLY_EXIT
            found[name] = own or "ok"
            wrong += [f"{name}, {policy}: {fault}" for policy, fault in own.items()]
        wrong += _other_decisions(both, build, policies, setting, found)
    if wrong:
        raise Wrong("\n".join(wrong))
    return {"policies": list(policies), "found": found}


def _policies(both: Models, setting: Setting) -> dict[str, SkipPolicy]:
    half = {f"{kv}, {group}": policy_of(router(0.5, kv, group)) for kv, group in _KV_GROUPS}
    ffn = router(0.5, "omit") | {"skip": ["ffn"]}
    attention = router(0.5, "project") | {"skip": ["attention"]}
    similarity = {"layers": "1:", "skip": ["ffn"], "kind": "similarity", "threshold": 0.9}
    del ffn["kv"]
    width = both.hf.config.text_config.hidden_size
    chosen: dict[str, SkipPolicy] = {
        **half,
        "reuse": policy_of(router(0.5, "reuse", layers="1:")),
        "ffn": policy_of(ffn),
        "attention": policy_of(attention),
        "similarity": policy_of(similarity),
        "linear": policy_of(linear(0.0, both.depth, width, setting.folder)),
    }
    names = ("omit, row", "similarity") if setting.is_tiny else tuple(chosen)
    return {name: chosen[name] for name in names}


def _other_decisions(
    both: Models,
    build: Callable[[torch.dtype], Any],
    policies: dict[str, SkipPolicy],
    setting: Setting,
    found: dict[str, Any],
) -> list[str]:
    """Policies under which the device decides unlike its torch form on the same prompt."""
    wrong = []
    form = models(build, both.hf.dtype, setting.device.type, "torch").ours
    # Long enough for products by index and count; repeated until the prompt is captured.
    words, times = (6, 1) if setting.is_tiny else (90, 3)
    inputs = ragged(prompts(both.hf, Shape("tiny", build, 2, words), 2))
    for name, policy in policies.items():
        records = []
        for model in (both.ours, form):
            fastskip.set_policy(model, policy)
            with fastskip.record_routing(model) as record, torch.no_grad():
                for _ in range(times):
                    model(**inputs)
            records.append(record.forwards[-1])
        ours, theirs = (each.skipped for each in records)
        asked = sum(int(mask.sum()) for mask in records[1].candidates.values())
        differing = sum(int((ours[key] != theirs[key]).sum()) for key in theirs)
        is_drawn = all(rule.kind == "random" for rule in policy.routers)
        found[f"{both.hf.dtype}, {name}: other than torch's form"] = f"{differing} of {asked}"
        if ours.keys() != theirs.keys() or differing > (0 if is_drawn else NEAR * asked):
            wrong.append(f"{name}: {differing} of {asked} decisions differ from the torch form's")
    return wrong
