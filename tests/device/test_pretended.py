"""Whole models on a CUDA device that is only pretended (``tests.device.pretended``), in a process
of their own: what they say, where the host waits, and what a capture or a replay would break."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="has a CUDA device, so none is pretended"
)

ROOT = Path(__file__).parents[2]
GREEDY = ("llava", "llava_next", "granite", "qwen3_vl", "skips", "routers", "removals")
HOST_IDS = ("host ids", "host ids, sampled")

KNOWN = {
    "_Transfer.wait",  # the tokens of a step
}
"""Functions that may wait between the decoder's entry and the end of ``generate``."""
OF_POLICIES = {
    "removals": {"RemainingRows.remove"},  # who leaves
}
"""More of them, under a policy."""
BEFORE_REPLAYS = {
    # What a graph is made of.
    *("DeviceNumbers.send", "StepState.__init__", "DeviceRoutes.__init__"),
}
"""Those of calls that launch their prompt, or capture something."""

Run = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return seen("tests.device.pretended", tmp_path_factory)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return seen("tests.device.pretended.protocol", tmp_path_factory)


def seen(module: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What a module prints, run once, whoever of several workers asks first."""
    base = tmp_path_factory.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{module}.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_text(made(module))
    found: dict[str, Run] = json.loads(kept.read_text())
    return found


def made(module: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def calls_of(run: Run) -> list[Run]:
    """What its calls of ``generate`` found, if all of them came to an end."""
    assert "error" not in run, "\n".join((*run["faults"], run["error"]))
    calls: list[Run] = run["calls"]
    return calls


@pytest.mark.parametrize("name", (*GREEDY, *HOST_IDS))
def test_tokens_are_those_of_the_host(name: str, runs: dict[str, Run]) -> None:
    for call in calls_of(runs[name]):
        assert call["tokens"] == call["expected"]


@pytest.mark.parametrize("name", (*GREEDY, *HOST_IDS, "autocast"))
def test_nothing_that_a_device_forbids(name: str, runs: dict[str, Run]) -> None:
    """No two devices in one operation, no pointer to the host's memory in a launch; in a capture no
    wait and no copy from or to the host; in a replay no memory that is gone."""
    for call in calls_of(runs[name]):
        assert not call["faults"], "\n".join(call["faults"])


@pytest.mark.parametrize("name", GREEDY)
def test_tower_prompt_and_steps_are_replayed(name: str, runs: dict[str, Run]) -> None:
    """Else the other tests look at nothing: two steps, each stage, and all towers but Qwen's, whose
    sizes are numbers on the device."""
    calls = calls_of(runs[name])
    stages, towers = 1 + (name == "removals"), int(name != "qwen3_vl")
    assert [call["replays"] for call in calls[1:]] == [2 + stages + towers] * 2
    assert [call["towers"] for call in calls] == [0, towers, towers]


@pytest.mark.parametrize("name", GREEDY)
def test_the_host_waits_where_it_is_known_to(name: str, runs: dict[str, Run]) -> None:
    known = KNOWN | OF_POLICIES.get(name, set())
    first, second, last = calls_of(runs[name])
    for call, allowed in ((first, BEFORE_REPLAYS), (second, BEFORE_REPLAYS), (last, set())):
        others = [wait for wait in call["waits"] if wait["function"] not in known | allowed]
        assert not others, "\n".join(f"{wait['what']} in {wait['stack']}" for wait in others)


@pytest.mark.parametrize("name", GREEDY)
def test_the_host_waits_no_more_often_than_it_must(name: str, runs: dict[str, Run]) -> None:
    """Once a token, and once for a removal."""
    call = calls_of(runs[name])[-1]
    waits = [wait["function"] for wait in call["waits"]]
    assert waits.count("_Transfer.wait") == call["new"] > 1
    assert waits.count("RemainingRows.remove") == (name == "removals")


def test_towers_under_autocast_are_not_captured(runs: dict[str, Run]) -> None:
    calls = calls_of(runs["autocast"])
    assert [call["towers"] for call in calls] == [0] * len(calls)


@pytest.mark.parametrize(
    "name", ("ceilings", "nodes", "prefill", "end to end", "ways of steps", "blocks", "tune")
)
def test_cells_of_the_gpu_protocol(name: str, cells: dict[str, Run]) -> None:
    """They come to an end, leave nothing out, and do nothing that a device forbids."""
    found = cells[name]
    assert "error" not in found, found["error"]
    assert not found["faults"], "\n".join(found["faults"])
    left_out = ("failures", "notes")
    assert all(not found["values"].get(each) for each in (*left_out, "faults"))
