"""The key of a kernel's source: equal while what is compiled is equal, however it is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SOURCE = """
from typing import NamedTuple
import triton
import triton.language as tl
from triton.language import core
import lower

SCALE = tl.constexpr(2)

class Pair(NamedTuple):
    first: tl.tensor
    second: tl.tensor

@core.extern
def foreign(x, _semantic=None):
    return core.extern_elementwise("", "", [x], {}, is_pure=False, _semantic=_semantic)

@triton.jit
def helper(x):
    return lower.deep(x) * SCALE

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    pair = Pair(tl.load(x_ptr), tl.load(x_ptr + N))
    foreign(pair.first)
    tl.store(x_ptr, helper(pair.second))
"""
LOWER = """
import triton

@triton.jit
def deep(x):
    return x + 1
"""
REWRITTEN = {
    "comments": ("    foreign(pair.first)", "    # Why.\n\n    foreign(pair.first)  # how"),
    "docstring": ("    return lower.deep", '    """What it is."""\n    return lower.deep'),
    "position": ("@triton.jit\ndef helper", "\n\n\n@triton.jit\ndef helper"),
    "another function": (
        "@triton.jit\ndef helper",
        "def unused():\n    pass\n\n@triton.jit\ndef helper",
    ),
}
CHANGED = {
    "body": ("x_ptr + N", "x_ptr + 2 * N"),
    "helper": ("lower.deep(x) * SCALE", "lower.deep(x) - SCALE"),
    "constant": ("constexpr(2)", "constexpr(3)"),
    "decorator": ("@triton.jit\ndef kernel", "@triton.jit(do_not_specialize=['N'])\ndef kernel"),
    "inlining": ("@triton.jit\ndef helper", "@triton.jit(noinline=True)\ndef helper"),
    "fields of a tuple": ("first: tl.tensor\n    second", "second: tl.tensor\n    first"),
    "foreign function": ("is_pure=False", "is_pure=True"),
}
PRINTS = """
import importlib, json, sys
from fastskip.kernels.sources import meaning_of
print(json.dumps({name: meaning_of(importlib.import_module(name).kernel) for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def meanings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By case; in a process whose kernels are not interpreted."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "lower.py").write_text(LOWER)
    (folder / "lower_changed.py").write_text(LOWER.replace("x + 1", "x + 2"))
    sources = {"as it is": SOURCE}
    for case, (old, new) in {**REWRITTEN, **CHANGED}.items():
        assert SOURCE.count(old) == 1, case
        sources[case] = SOURCE.replace(old, new)
    below = SOURCE.replace("import lower", "import lower_changed as lower")
    sources["function of another module"] = below
    modules = {case: f"case_{number}" for number, case in enumerate(sources)}
    for case, source in sources.items():
        (folder / f"{modules[case]}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PRINTS, *modules.values()]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {case: found[module] for case, module in modules.items()}


@pytest.mark.parametrize("case", REWRITTEN)
def test_what_changes_nothing_keeps_the_key(meanings: dict[str, str], case: str) -> None:
    assert meanings[case] == meanings["as it is"]


@pytest.mark.parametrize("case", [*CHANGED, "function of another module"])
def test_what_is_compiled_is_in_the_key(meanings: dict[str, str], case: str) -> None:
    assert meanings[case] != meanings["as it is"]
