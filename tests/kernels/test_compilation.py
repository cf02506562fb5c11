"""The compile gate: what a launch compiles to, and that each of its checks can fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compile_gate, probes
from fastskip.kernels import compilation, tuning
from fastskip.kernels.compilation import Finding
from fastskip.kernels.launch import Launch

ROOT = Path(__file__).parents[2]

COMPILES = """
import dataclasses, json
import torch
from fastskip.kernels.compilation import build_of, compile_all, compile_build
from fastskip.kernels.head import head_logits
from fastskip.kernels.launch import launch, recording
from fastskip.kernels.norm import normalize
from fastskip.kernels.overlap import overlapping, read, touch, wait
from fastskip.kernels.row_gemm import linear_rows
from fastskip.ops.contracts import Activation, Linear, Norm
import triton
import triton.language as tl

@triton.jit
def _late_kernel(x_ptr, out_ptr, OVERLAP: tl.constexpr):
    x = tl.load(x_ptr)
    wait()
    tl.store(out_ptr, x)

@triton.jit
def _leaving_kernel(x_ptr, out_ptr, n, OVERLAP: tl.constexpr):
    if tl.program_id(0) > n:
        return
    wait()
    tl.store(out_ptr, tl.load(x_ptr))

@triton.jit
def _ahead_kernel(x_ptr, out_ptr, OVERLAP: tl.constexpr):
    x = read(x_ptr, tl.program_id(0) >= 0, True)
    touch(x_ptr + 9)
    wait()
    tl.store(out_ptr, x)

@triton.jit
def _rash_kernel(x_ptr, out_ptr, OVERLAP: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr))

def blank(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

def exact(form, block, stages, warps):
    # A prompt's product in fp32.
    x, weight = (torch.empty(n, 256, dtype=torch.float32, device="meta") for n in (640, 512))
    sizes = dict(BLOCK_N=block, BLOCK_M=block, BLOCK_E=64, GROUP=8, STAGES=stages)
    config = {**sizes, "num_warps": warps}
    return recorded(linear_rows, x, Linear(weight), activation=form, config=config)

def recorded(call, *arguments, **options):
    with recording(is_dry=True) as account:
        call(*arguments, **options)
    return account.launches[-1]

if __name__ == "__main__":
    norm = Norm(blank(256), 1e-5)
    config = dict(BLOCK_M=64, BLOCK_N=16, BLOCK_E=64, STAGES=3, num_warps=4)
    product = recorded(head_logits, blank(16, 256), None, Linear(blank(128, 256)), config=config)
    narrow = recorded(normalize, blank(4, 257)[:, :256], norm, config=dict(num_warps=4))
    tight = recorded(normalize, blank(4, 8192), Norm(blank(8192), 1e-5), config=dict(num_warps=4))
    tight = dataclasses.replace(tight, options={"num_warps": 4, "maxnreg": 32})
    builds = [build_of(launch, 90) for launch in (product, narrow, tight)]
    builds.append(build_of(product, 80))
    with overlapping(True):
        again = recorded(head_logits, blank(16, 256), None, Linear(blank(128, 256)), config=config)
        pair = dict(x_ptr=blank(16), out_ptr=blank(16))
        late = recorded(launch, _late_kernel, (1,), {}, **pair)
        leaving = recorded(launch, _leaving_kernel, (1,), {}, n=3, **pair)
        rash = recorded(launch, _rash_kernel, (1,), {}, **pair)
        ahead = recorded(launch, _ahead_kernel, (1,), {}, **pair)
    builds += [build_of(launch, 90) for launch in (again, late, leaving, rash, ahead)]
    forms = (None, Activation.GATED_SILU)
    tiles = ((128, 4, 8), (64, 5, 4))
    in_full = [build_of(exact(form, *how), 90) for form in forms for how in tiles]
    builds += in_full
    findings = compile_all(builds, workers=1)
    kept = compile_all(builds)
    assert kept == findings
    wrong = dataclasses.replace(builds[0], constants={})
    found = [dataclasses.asdict(findings[build.key]) for build in builds]
    print(json.dumps({
        "findings": found[: -len(in_full)],
        "exact": found[-len(in_full) :],
        "signature": dict(builds[0].signature),
        "attributes": [list(path) for path in builds[0].attributes],
        "error": next(iter(compile_all([wrong], workers=1).values())).error,
    }))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a process whose kernels are not interpreted finds."""
    folder = tmp_path_factory.mktemp("compiled")
    script = folder / "compiles.py"  # a file: its worker processes import it again
    script.write_text(COMPILES)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def findings(compiled: dict[str, object], which: str = "findings") -> list[Finding]:
    listed = compiled[which]
    assert isinstance(listed, list)
    return [Finding(**each) for each in listed]


def test_findings_are_those_of_the_machine_code(compiled: dict[str, object]) -> None:
    product, narrow, tight, older, *_ = findings(compiled)
    assert product.matrix and "HGMMA" in product.matrix
    assert older.matrix and "HMMA" in older.matrix and "HGMMA" not in older.matrix
    assert product.wide > 0 and product.shared > 0 and 0 < product.registers <= 255
    assert product.spills == 0
    assert narrow.wide == 0, "rows of 257 elements cannot be read 16 bytes at a time"
    assert tight.spills > 0 and tight.registers <= 32


def test_full_precision_products_of_prompts_spill_nothing(compiled: dict[str, object]) -> None:
    """Their operands are in registers, whatever tiles suit half precision."""
    assert [each.spills for each in findings(compiled, "exact")] == [0] * 4


def test_what_overlaps_waits_before_all_else(compiled: dict[str, object]) -> None:
    product, _, _, _, overlapping, late, leaving, rash, ahead = findings(compiled)
    assert product.waits == product.early == 0
    assert (overlapping.waits, overlapping.early) == (1, 0)
    assert (late.waits, leaving.waits, rash.waits) == (1, 1, 0)
    assert late.early > 0 and leaving.early > 0
    assert (ahead.waits, ahead.early) == (1, 0), "past the caches, nothing is too early"


def test_a_kernel_that_does_not_compile_is_an_error(compiled: dict[str, object]) -> None:
    assert compiled["error"]


def test_launches_are_specialised_as_on_a_device(compiled: dict[str, object]) -> None:
    signature, attributes = compiled["signature"], compiled["attributes"]
    assert isinstance(signature, dict) and isinstance(attributes, list)
    weight, stride, bias = signature["weights"]
    assert (weight, stride, bias) == ("*bf16", "i32", "constexpr")
    assert signature["rows"] == "i32" and signature["BLOCK_M"] == "constexpr"
    names = list(signature)
    divisible = {(names[first], *rest) for first, *rest in attributes}
    x, stride, epsilon = ("inputs", 0), ("inputs", 1), ("inputs", 7)
    assert {x, stride, ("weights", 0), ("weights", 1), ("rows",)} <= divisible
    assert epsilon not in divisible


GOOD = Finding(registers=100, shared=1 << 16, wide=8, matrix={"HGMMA": 4})
BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 16}


@pytest.mark.parametrize(
    ("finding", "arch", "says"),
    [
        (GOOD, 90, None),
        (replace(GOOD, spills=8), 90, "spills 8 bytes"),
        (replace(GOOD, shared=100 << 10), 90, None),
        (replace(GOOD, shared=228 << 10), 90, "shared memory"),
        (replace(GOOD, wide=0), 90, "wide loads"),
        (replace(GOOD, matrix={"HMMA": 4}), 90, "no HGMMA"),
        (replace(GOOD, matrix={"HMMA": 4}), 80, None),
        (replace(GOOD, matrix={"HMMA": 4}, shared=100 << 10), 89, "shared memory"),
        (replace(GOOD, matrix={}), 80, "no HMMA"),
        (replace(GOOD, waits=1), 90, None),
        (replace(GOOD, waits=1, early=2), 90, "2 times before it waits"),
        (Finding(error="CompilationError: at 1:2\nmore"), 90, "CompilationError: at 1:2"),
    ],
)
def test_each_check_can_fail(finding: Finding, arch: int, says: str | None) -> None:
    faults = list(compile_gate.faults_of("head", BLOCKS, arch, finding))
    assert len(faults) == (says is not None)
    assert says is None or says in faults[0]


def test_who_overlaps_has_to_wait() -> None:
    blocks = {**BLOCKS, "launch_pdl": True}
    assert list(compile_gate.faults_of("head", blocks, 90, GOOD)) == ["overlaps but never waits"]
    assert not list(compile_gate.faults_of("head", blocks, 90, replace(GOOD, waits=1)))


def test_changes_against_the_kept_rows_are_named() -> None:
    row = compile_gate.Compiled("default", "call", "head", "7b", 1, {}, GOOD, (), "ab").record
    more, other = {**row, "registers": 120}, {**row, "rows": 2}
    assert compile_gate.differences([row], [row]) == {}
    assert not list(compile_gate.outdated([row], [row, {**row, "key": "cd", "registers": 7}]))
    (line,) = compile_gate.outdated([row], [{**row, "registers": 7}])
    assert "'registers': 7" in line
    changes = list(compile_gate.differences([more, other], [row, {**row, "rows": 4}]).values())
    assert changes == ["registers was 100", "new", "gone"]


def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compilation.build_of(Launch("head", (1,), kernel=print), 90)


@pytest.mark.parametrize("slug", tuning.slugs())
def test_probes_reach_every_entry_of_a_table(slug: str) -> None:
    assert list(compile_gate.unreached(slug, list(probes.record(slug)))) == []


def test_an_entry_that_nothing_reaches_is_named() -> None:
    found = [probed for probed in probes.record("default") if probed.launch.name != "embed"]
    assert "embed" in next(compile_gate.unreached("default", found))


def test_kept_findings_are_known_but_for_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    row = compile_gate.Compiled("default", "call", "head", "7b", 1, {}, GOOD, (), "").record
    keys = [f"{number:08x}" for number in range(3 * compile_gate.ONE_IN)]
    monkeypatch.setattr(compile_gate, "_kept", lambda arch: [{**row, "key": key} for key in keys])
    known = compile_gate.known(90)
    assert len(known) == len(keys) - 3 and keys[0] not in known
    assert all(finding == GOOD for finding in known.values())
