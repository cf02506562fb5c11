"""Kernels as the PTX that they compile to, in processes whose kernels are not interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_BARRIERS = """
import json
from dataclasses import replace
import torch
from fastskip.kernels.head import head_logits
from fastskip.kernels.norm import normalize
from fastskip.kernels.residual import add_terms_
from fastskip.ops.contracts import ARRIVALS, Linear, Norm, Term
from tests.ptx.launches import executing
from tests.ptx.memory import RaceError

def outcome(call, right):
    try:
        return "right" if torch.allclose(call().float(), right, atol=0.05) else "wrong"
    except RaceError as error:
        return "race"

torch.manual_seed(0)
x, weight = torch.randn(3, 520).bfloat16(), torch.randn(520).bfloat16()
words = (torch.randn(70, 520) / 23).bfloat16()
terms = [Term(x, Linear(words[:40]))]
shared = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_E=32, STAGES=2, SPLITS=2, num_warps=4)

def added():
    h, arrivals = torch.zeros(3, 40).bfloat16(), torch.zeros(ARRIVALS, dtype=torch.int32)
    add_terms_(h, terms, arrivals=arrivals, config=shared)
    return h

config = dict(BLOCK_M=4, BLOCK_N=1, BLOCK_E=256, STAGES=2, num_warps=2)
calls = {
    "normalize": (
        lambda: normalize(x, Norm(weight, 1e-5), config={"num_warps": 4}),
        torch.nn.functional.rms_norm(x.float(), (520,), weight.float(), 1e-5),
    ),
    "head": (
        lambda: head_logits(x[:1], None, Linear(words), config=config),
        x[:1].float() @ words.float().t(),
    ),
    "shared tiles": (added, x.float() @ words[:40].float().t()),
}
found = {}
for arch in (80, 90):
    for name, (call, right) in calls.items():
        with executing(arch) as compiler:
            found[f"{name}, {arch}"] = [outcome(call, right)]
            (own,) = compiler.programs.values()
        barriers = [n for n, each in enumerate(own.program.instructions) if each.name == "bar"]
        for number in barriers:
            with executing(arch) as compiler:
                compiler.programs[own.build.key] = replace(own, program=own.program.without(number))
                found[f"{name}, {arch}"].append(outcome(call, right))
print(json.dumps(found))
"""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Any]]:
    done = _run("-c", WITHOUT_BARRIERS)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_barrier_of_a_kernel_is_missed(outcomes: dict[str, list[Any]]) -> None:
    """Without any one of them there is a race; with all of them there is none."""
    kernels = {name.partition(",")[0] for name in outcomes}
    assert kernels == {"normalize", "head", "shared tiles"} and len(outcomes) == 6
    for name, (whole, *without) in outcomes.items():
        assert whole == "right", name
        assert without and set(without) == {"race"}, (name, without)


def test_tests_of_kernels_pass_compiled() -> None:
    done = _run("-m", "pytest", "-q", "tests/kernels/test_activation.py", "--ptx", "80")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
