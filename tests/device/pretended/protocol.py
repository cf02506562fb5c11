"""Cells of the GPU protocol in small on the pretended device, by the ways that they take on a real
one: graphs, events, conditional nodes. Prints what was seen, as JSON in one line."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import gate
from benchmarks.gpu import (
    ceilings,
    end_to_end,
    graphs,
    models,
    nodes,
    routed_blocks,
    step_ways,
    timing,
    tune,
)
from benchmarks.gpu.cells import Setting
from benchmarks.gpu.half_works import DECODE_HALVED
from benchmarks.gpu.inputs import TINY
from benchmarks.gpu.prefill_works import PREFILL
from benchmarks.gpu.results import Results, Values
from benchmarks.peers import DENSE, HF
from fastskip.kernels import tuning
from fastskip.ops.graphs import capture
from fastskip.ops.overlap import Overlap
from tests.device.interpreted import STREAM
from tests.device.pretended.device import pretending
from tests.device.pretended.graphs import NodeBodies
from tests.device.pretended.log import LOG
from tests.interpreting import interpreting_quickly

SMALL = replace(TINY, hidden=32, heads=2, groups=1, ffn=48, layers=1)
WORKS = {"add": DECODE_HALVED["half norm: add_down"], "compact": PREFILL["compact"]}
WAYS = (
    step_ways.Way("ordinary", Overlap.NONE),
    step_ways.Way("reading ahead, half norms", Overlap.READ, halves=True),
)


def bodies(setting: Setting) -> Values:
    """Nodes whose conditions kernels set."""
    inside = nodes._captured_bodies(setting.device) | nodes._turns(setting.device)
    return {**nodes.cost(setting), "inside": inside}


def replayed(setting: Setting, step: Callable[[], Any], depth: int) -> float:
    """Instead of a measurement."""
    capture(step, setting.device)()
    return 1.0


CELLS: Mapping[str, Callable[[Setting], Values]] = {
    "ceilings": lambda setting: {**ceilings.memory(setting), **ceilings.matrix(setting)},
    "nodes": bodies,
    "prefill": partial(graphs.prefill, widths=SMALL),
    "end to end": partial(end_to_end.measure, widths=SMALL, batch=1),
    "ways of steps": partial(step_ways.measure, widths=SMALL, batch=1, names=["dense"], ways=WAYS),
    "blocks": partial(routed_blocks.blocks, widths=SMALL),
    "tune": partial(tune.tune, widths=SMALL, rows=1),
}
SHORT: Any = {
    ceilings: {"BUFFER_BYTES": 1 << 16, "SIZES": (16,)},
    end_to_end: {"N_NEW": 3, "ROUNDS": 1, "PEERS": (HF, DENSE)},
    gate: {"IMAGE_ROWS": 4, "TEXT_BEFORE": 1, "TEXT_AFTER": 1, "NEW": 2},
    graphs: {"OWN_LAYERS": 1, "eager_seconds": partial(timing.eager_seconds, runs=1)},
    models: {"SMALL": SMALL},
    nodes: {"PROGRAMS": (2,), "MANY": 4, "FEW": 2, "REPLAYS": 1, "GraphBodies": NodeBodies},
    routed_blocks: {"DEPTH": 2, "PROGRAMS": (), "TURNS": (2,), "microseconds": replayed},
    step_ways: {"N_NEW": 3, "policies": partial(models.policies, names=["dense"])},
    tune: {
        **{"REPLAYS": 1, "write_tables": lambda *_: None, "DECODE": WORKS},
        **dict.fromkeys(("DECODE_ARRANGED", "DECODE_HALVED", "DECODE_ROUTED"), {}),
    },
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = dict[str, Any]()
    with ExitStack() as blocks:
        for block in (interpreting_quickly(), pretending(), tuning.table(STREAM)):
            blocks.enter_context(block)
        patched = blocks.enter_context(pytest.MonkeyPatch.context())
        for module, own in SHORT.items():
            for name, value in own.items():
                patched.setattr(module, name, value)
        folder = Path(blocks.enter_context(tempfile.TemporaryDirectory()))
        setting = Setting(Results(folder), torch.device("cuda"), is_tiny=False)
        for name in names or CELLS:
            LOG.clear()
            try:
                found[name] = {"values": CELLS[name](setting)}
            except Exception:  # the others can be judged all the same
                found[name] = {"error": traceback.format_exc()}
            found[name]["faults"] = LOG.faults
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
