"""Guarded sublayers as IF nodes of a decode step's graph.

A skipped sublayer then costs one node instead of its kernels, each of which would read the flags
and leave. torch makes such nodes from 2.13 on; here CUDA's own bindings do (``cuda-bindings``,
which torch's wheels for CUDA 13 bring along), so that torch 2.11 will do.

What is assumed of a body:

- Its launches go to the current stream, which is another one while a body is captured. Triton's
  do. Library products are left out: their workspaces belong to streams (``MOST_ROWS``).
- What it allocates is used in bodies only, one after the other, and lies in a memory pool of its
  own as long as any graph that has bodies lives. torch's allocator knows a capture by its id, and
  that of a body is another one than its graph's; without the pool it would hand out the memory
  again to work outside of the graph.
- Kernels are compiled and loaded before: ``graphs.capture`` runs the work first.
- Conditions are set before they are read, so that their default does not matter; it is 0.
"""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.conditional_layer import Bodies, Body
from fastskip.ops.conditions import set_condition

MOST_ROWS = 64
"""Steps of more rows have library products in their guarded sublayers, and keep early exits."""


class Guarding(Enum):
    """How a decode step passes by what no row runs.

    ``EARLY_EXIT``: every kernel reads the flags and leaves. Works in every graph, costs a node for
    each kernel (about 1 us), and lets decisions ride in residual updates.

    ``CONDITIONAL``: what is passed by is the body of an IF node. Costs that node, a launch that
    sets its condition, and a launch for each decision that would ride in an update of the body.

    The first one is the default. ``benchmarks.gpu routing`` measures both; the second is adopted
    where it makes a step at batch 1 at least 3 % faster, and not before.
    """

    EARLY_EXIT = "early_exit"
    CONDITIONAL = "conditional"


def bodies_on(device: torch.device) -> Bodies:
    """What leaves out bodies of steps on a device.

    Raises:
        ValueError: on CUDA, without the bindings.
    """
    return GraphBodies(device) if device.type == "cuda" else HostBodies()


class HostBodies:
    """The host looks at the flags: what IF nodes do, where there are no graphs."""

    def run_if(self, runs: Tensor, body: Body) -> None:
        if bool(runs.any()):
            body()


class GraphBodies:
    """IF nodes in the graph that the current stream is captured into.

    Outside of a capture bodies run, and their kernels leave by themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self._driver = load_driver()
        with torch.cuda.device(device):
            # torch's streams come round again: one of them may be captured itself by then.
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
            self._pool = torch.cuda.MemPool()

    def run_if(self, runs: Tensor, body: Body) -> None:
        if not torch.cuda.is_current_stream_capturing():
            set_condition(runs, 0)
            body()
            return
        driver, outer = self._driver, torch.cuda.current_stream().cuda_stream
        graph, _ = _captured(driver, outer)
        handle = new_handle(driver, graph)
        set_condition(runs, int(handle))
        graph, after = _captured(driver, outer)
        node, inside = add_if(driver, graph, after, handle)
        flag = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        edges = _edges(driver)
        checked(
            driver,
            driver.cuStreamUpdateCaptureDependencies(outer, [node], *edges, 1, int(flag)),
        )
        stream = next(own for own in self._streams if own.cuda_stream != outer)
        inner = stream.cuda_stream
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        begun = driver.cuStreamBeginCaptureToGraph(inner, inside, None, None, 0, mode)
        checked(driver, begun)
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._pool):
                body()
        finally:
            ended = driver.cuStreamEndCapture(inner)
        checked(driver, ended)


def load_driver() -> Any:
    """CUDA's driver API.

    Raises:
        ValueError: the bindings are not installed, or older than IF nodes.
    """
    module = "cuda.bindings.driver"
    needed = (
        "conditional graph nodes need the package cuda-bindings (pip install 'cuda-bindings>=13', "
        "of the driver's CUDA version); allowed without it: Guarding.EARLY_EXIT"
    )
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise ValueError(f"guarding: {needed}")
    driver = import_module(module)
    if not hasattr(driver, "cuStreamBeginCaptureToGraph"):
        raise ValueError(f"guarding: {module} is too old: {needed}")
    return driver


def new_handle(driver: Any, graph: Any, default: int = 0) -> Any:
    """A condition in ``graph``, which starts every launch as ``default``."""
    context = checked(driver, driver.cuCtxGetCurrent())
    flag = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
    return checked(driver, driver.cuGraphConditionalHandleCreate(graph, context, default, flag))


def add_if(driver: Any, graph: Any, after: list[Any], handle: Any) -> tuple[Any, Any]:
    """An IF node behind the nodes ``after``, and the graph of its body."""
    what = driver.CUgraphNodeParams()
    what.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    what.conditional.handle = handle
    what.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
    what.conditional.size = 1
    what.conditional.ctx = checked(driver, driver.cuCtxGetCurrent())
    made = driver.cuGraphAddNode(graph, after, *_edges(driver), len(after), what)
    return checked(driver, made), what.conditional.phGraph_out[0]


def checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    """What a call of the driver returned.

    Raises:
        RuntimeError: it failed.
    """
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver refused a graph node: {status}")
    return values[0] if values else None


def _captured(driver: Any, stream: int) -> tuple[Any, list[Any]]:
    """The graph that a stream is captured into, and what its next node will depend on."""
    answer = driver.cuStreamGetCaptureInfo(stream)
    checked(driver, answer)
    _, _, _, graph, after, *_ = answer
    return graph, list(after)


def _edges(driver: Any) -> tuple[None, ...]:
    """CUDA 13 has an argument more for dependencies; nobody here needs it."""
    return () if int(driver.CUDA_VERSION) < 13000 else (None,)
