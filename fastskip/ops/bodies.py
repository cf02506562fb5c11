"""Guarded sublayers as bodies of conditional nodes of a CUDA graph.

An IF node bypasses its body if no row runs; a WHILE node repeats it as long as some row does
(``ops.hops``). A SWITCH node selects among bodies captured for different numbers of rows: the host
never learns how many rows run, yet each body has GEMMs of a known size, which a library does best.

What is assumed of a body:

- It launches on the current stream, which is a different one while a body is captured. Triton and
  torch do. Workspaces of library GEMMs belong to streams; those of bodies are reserved before a
  capture.
- What it allocates is used in bodies only, one after the other, and comes from a separate memory
  pool that lives as long as any graph with bodies. torch's allocator knows a capture by its id, and
  a body's id differs from its graph's; without the pool it would hand the memory out again to work
  outside the graph.
- Kernels are compiled and loaded beforehand: ``graphs.capture`` runs the work first, and outside a
  capture every body runs.
- Conditions are set before they are read, so their default, 0, does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.conditions import set_condition
from fastskip.ops.graph_nodes import (
    NodeKind,
    add_node,
    checked,
    edges_of,
    load_driver,
    new_handle,
)
from fastskip.ops.routes import Chosen, Switch

Body = Callable[[], object]
# One iteration of a loop; takes the condition that it sets.
Turn = Callable[[int], object]
CountedBody = Callable[[Chosen], object]
# From flags, and the node that depends on their number, to the rows that run.
Choose = Callable[[Tensor, Switch | None], Chosen]

BOUNDS = 64
"""Bodies are for multiples of this many rows; up to this many, a single body reads flags."""
MOST_BODIES = 8
"""Of a SWITCH node, since each must be captured. On an H200 finer bounds gain 4 % at most: the
library takes longer for 576 rows than for 640, and hardly less for 448 than for 512."""


class Bodies(Protocol):
    """Runs what can be bypassed if no row runs, or puts it into a graph."""

    def run_if(self, runs: Tensor, body: Body) -> None:
        """Runs ``body()`` if any of the flags ``runs [n]`` is not 0 when it is reached."""

    def run_while(self, runs: Tensor, begin: Turn, body: Turn, most: int) -> None:
        """Runs ``begin``, then ``body`` as long as any of the flags ``runs [n]`` that they leave is
        not 0. Both set the condition that they take accordingly. ``body`` changes nothing if all
        flags are 0, which they are after at most ``most`` iterations."""

    def run_counted(self, runs: Tensor, choose: Choose, body: CountedBody) -> None:
        """Runs ``body`` on the rows that ``runs [n]`` flags by then, if any; with many rows in all,
        their bound (``Chosen``) exceeds their number by less than one step between bodies."""


def bodies_on(device: torch.device) -> Bodies:
    """How a device runs or bypasses bodies.

    Raises:
        ValueError: on CUDA, if its bindings are missing or too old.
    """
    return GraphBodies(device) if device.type == "cuda" else HostBodies()


def bounds_of(rows: int) -> tuple[int, list[int]]:
    """The step between bodies, and the most rows that each is for; the last one is for all."""
    step = BOUNDS * -(-rows // (BOUNDS * MOST_BODIES))
    return step, [min(bound, rows) for bound in range(step, rows + step, step)]


class HostBodies:
    """The host reads the flags and does what graph nodes do, where there are no graphs."""

    def run_if(self, runs: Tensor, body: Body) -> None:
        if bool(runs.any()):
            body()

    def run_while(self, runs: Tensor, begin: Turn, body: Turn, most: int) -> None:
        begin(0)
        while bool(runs.any()):
            body(0)

    def run_counted(self, runs: Tensor, choose: Choose, body: CountedBody) -> None:
        count = int(runs.sum())
        if not count:
            return
        chosen = choose(runs, None)
        if len(runs) > BOUNDS:
            _, bounds = bounds_of(len(runs))
            chosen = chosen.at_most(next(bound for bound in bounds if count <= bound))
        body(chosen)


class GraphBodies:
    """Conditional nodes in the graph that the current stream is captured into.

    Outside a capture every body runs, and its kernels exit early by themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self._driver = load_driver()
        with torch.cuda.device(device):
            # torch reuses streams, so one of the two may be capturing by then.
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
            self._pool = torch.cuda.MemPool()
            for stream in self._streams:
                with torch.cuda.stream(stream):
                    _take_workspaces(device)

    def run_if(self, runs: Tensor, body: Body) -> None:
        handle = self._new_handle()
        set_condition(runs, int(handle))
        self._run(NodeKind.IF, handle, [body])

    def run_while(self, runs: Tensor, begin: Turn, body: Turn, most: int) -> None:
        handle = self._new_handle()
        begin(int(handle))
        self._run(NodeKind.WHILE, handle, [partial(body, int(handle))], most)

    def run_counted(self, runs: Tensor, choose: Choose, body: CountedBody) -> None:
        if len(runs) <= BOUNDS:
            body(choose(runs, None))
            return
        step, bounds = bounds_of(len(runs))
        handle = self._new_handle()
        chosen = choose(runs, Switch(int(handle), step))
        own = [partial(body, chosen.at_most(bound)) for bound in bounds]
        self._run(NodeKind.SWITCH, handle, own)

    def _run(self, kind: NodeKind, handle: Any, bodies: Sequence[Body], most: int = 1) -> None:
        """Makes a node of bodies; outside a capture, runs all of them ``most`` times."""
        if torch.cuda.is_current_stream_capturing():
            self._add(kind, handle, bodies)
            return
        for _ in range(most):
            for body in bodies:
                body()

    def _new_handle(self) -> Any:
        """A condition of the graph that the current stream is captured into; 0 outside a
        capture."""
        if not torch.cuda.is_current_stream_capturing():
            return 0
        graph, _ = self._captured()
        return new_handle(self._driver, graph)

    def _captured(self) -> tuple[Any, list[Any]]:
        """The graph that the current stream is captured into, and the nodes that its next one
        depends on."""
        answer = self._driver.cuStreamGetCaptureInfo(torch.cuda.current_stream().cuda_stream)
        checked(self._driver, answer)
        _, _, _, graph, after, *_ = answer
        return graph, list(after)

    def _add(self, kind: NodeKind, handle: Any, bodies: Sequence[Body]) -> None:
        """Captures bodies into a node that everything after it depends on."""
        driver, outer = self._driver, torch.cuda.current_stream().cuda_stream
        graph, after = self._captured()
        node, inside = add_node(driver, graph, after, handle, kind, len(bodies))
        flag = driver.CUstreamUpdateCaptureDependencies_flags.CU_STREAM_SET_CAPTURE_DEPENDENCIES
        edges = edges_of(driver)
        checked(
            driver,
            driver.cuStreamUpdateCaptureDependencies(outer, [node], *edges, 1, int(flag)),
        )
        stream = next(own for own in self._streams if own.cuda_stream != outer)
        inner = stream.cuda_stream
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        for own, body in zip(inside, bodies, strict=True):
            begun = driver.cuStreamBeginCaptureToGraph(inner, own, None, None, 0, mode)
            checked(driver, begun)
            try:
                with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._pool):
                    body()
            finally:
                ended = driver.cuStreamEndCapture(inner)
            checked(driver, ended)


def _take_workspaces(device: torch.device) -> None:
    """Makes libraries reserve their workspaces on the current stream, with and without a bias."""
    x = torch.zeros(16, 16, dtype=torch.float16, device=device)
    F.linear(x, x)
    F.linear(x, x, x[0])
