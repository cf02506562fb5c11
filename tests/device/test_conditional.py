"""Conditional graph nodes: what is left out, what stays outside of a body, and the calls in order.

Nodes need a device. Here the host looks at the flags instead of an IF node, and a stand-in of the
driver builds the graph that its calls describe; the kernel that sets a condition is compiled.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.decoder.fused.conditional_layer import IfBlock
from fastskip.generation.device_step import DeviceStep
from fastskip.generation.guarding import Guarding
from fastskip.kernels.launch import recording
from fastskip.ops import bodies as ops_bodies
from fastskip.ops import graph_nodes
from fastskip.ops.bodies import Choose, GraphBodies, HostBodies
from fastskip.ops.graph_nodes import load_driver
from fastskip.ops.routes import Chosen, Switch
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.device.conftest import IMPL
from tests.models import tiny_llava
from tests.policies import Policy, parallel
from tests.routing.routed import check_generate, random, routed, similarity

ROOT = Path(__file__).parents[2]

POLICIES: dict[str, Policy] = {
    f"{sublayers}, {kv}": routed(random("1:4", "all", sublayers, kv=kv, rate=0.6))
    for sublayers in ("attention", "block")
    for kv in ("project", "omit", "reuse")
} | {
    "ffn, in its layer's middle": routed(similarity("1:", "all", "ffn", threshold=0.5)),
    "ffn by chance": routed(random(":", "all", "ffn", rate=0.6)),
    "block by what the layer before did": routed(similarity("1:", "all", "block", threshold=0.5)),
    "both apart": routed(
        random(":", "all", "attention", kv="omit", rate=0.6),
        random(":", "all", "ffn", rate=0.6, seed=3),
    ),
    "parallel, one flag, nothing left": routed(
        random(":", "all", "block", kv="omit", rate=0.6), arrangements=(parallel(":"),)
    ),
    "parallel, one flag, projected": routed(
        random(":", "all", "block", rate=0.6), arrangements=(parallel(":", "shared"),)
    ),
    "parallel, two flags": routed(
        random(":", "all", "ffn", rate=0.6), arrangements=(parallel(":"),)
    ),
}
EARLY = ("parallel, one flag, projected", "parallel, two flags")
"""No bodies: launches are shared with what must run."""


class Counting(HostBodies):
    """Notes who was asked for and who ran."""

    def __init__(self) -> None:
        self.asked = self.ran = 0

    def run_if(self, runs: Tensor, body: Any) -> None:
        self.asked += 1
        self.ran += bool(runs.any())
        super().run_if(runs, body)


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(), impl=IMPL)


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, images=(1,), seed=3)


@pytest.fixture
def bodies(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    made = Counting()
    steps = trio.prepared._fastskip.steps
    monkeypatch.setattr("fastskip.decoder.fused.kept_graphs.bodies_on", lambda device: made)
    steps.guarding, steps._bodies = Guarding.CONDITIONAL, None
    steps._steps.clear()
    yield made
    steps.guarding = Guarding.EARLY_EXIT


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_left_out_changes_nothing(
    trio: Trio, batch: Batch, bodies: Counting, name: str
) -> None:
    """Against the oracle, like early exits; and some bodies did not run."""
    check_generate(trio, POLICIES[name], batch, new=6)
    if name in EARLY:
        assert bodies.asked == 0
    else:
        assert 0 < bodies.ran < bodies.asked


def test_early_exits_are_the_default(trio: Trio, batch: Batch) -> None:
    steps = trio.prepared._fastskip.steps
    assert steps.guarding is Guarding.EARLY_EXIT
    policy = POLICIES["block, omit"]
    early, _ = check_generate(trio, policy, batch)
    assert not any(_is_conditional(step) for step in steps._steps.values())
    steps.guarding = Guarding.CONDITIONAL
    try:
        conditional, _ = check_generate(trio, policy, batch)
    finally:
        steps.guarding = Guarding.EARLY_EXIT
    assert torch.equal(early, conditional)
    assert all(_is_conditional(step) for step in steps._steps.values())


def _is_conditional(step: DeviceStep) -> bool:
    return all(isinstance(block, IfBlock) for block in step._blocks)


def test_many_rows_keep_early_exits(trio: Trio, bodies: Counting) -> None:
    steps = trio.prepared._fastskip.steps
    decoder = SimpleNamespace(plan=SimpleNamespace(routed=[1]), anchor=torch.zeros(1))
    few, many = (steps._bodies_for(decoder, SimpleNamespace(batch=n)) for n in (64, 128))
    assert few is bodies and many is None


@dataclass
class Graph:
    """Nodes by number: what they are, and what they wait for."""

    nodes: dict[int, tuple[object, list[int]]] = field(default_factory=dict)

    def add(self, what: object, after: list[int]) -> int:
        assert set(after) <= self.nodes.keys(), "a node of another graph"
        self.nodes[number := len(self.nodes) + 1] = what, list(after)
        return number


class Cuda:
    """The part of the driver, and of torch, that captures with bodies call, as a simulation."""

    CUDA_VERSION = 13000
    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUresult = SimpleNamespace(CUDA_SUCCESS="success")
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(
        CU_GRAPH_COND_TYPE_IF="if",
        CU_GRAPH_COND_TYPE_SWITCH="switch",
        CU_GRAPH_COND_TYPE_WHILE="while",
    )
    CUstreamUpdateCaptureDependencies_flags = SimpleNamespace(CU_STREAM_SET_CAPTURE_DEPENDENCIES=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")

    def __init__(self) -> None:
        self.graph = Graph()
        self.streams: dict[int, tuple[Graph, list[int]]] = {1: (self.graph, [])}
        self.current, self.pool = 1, False
        self.handles: list[int] = []
        self.kinds: list[str] = []
        self.refused = ""

    def launch(self, *names: str) -> None:
        """Kernels on the current stream."""
        for name in names:
            graph, after = self.streams[self.current]
            self.streams[self.current] = graph, [graph.add((name, self.pool), after)]

    def answer(self, name: str, *values: Any) -> tuple[Any, ...]:
        return ("refused" if name == self.refused else "success", *values)

    def cuCtxGetCurrent(self) -> Any:
        return self.answer("context", 7)

    def cuGraphConditionalHandleCreate(self, graph: Graph, context: int, *rest: int) -> Any:
        assert context == 7 and rest == (0, self.CU_GRAPH_COND_ASSIGN_DEFAULT)
        assert graph is self.graph
        self.handles.append((1 << 63) + len(self.handles))
        return self.answer("handle", self.handles[-1])

    def cuStreamGetCaptureInfo(self, stream: int) -> Any:
        graph, after = self.streams[stream]
        return self.answer("info", "active", 3, graph, tuple(after), None, len(after))

    def CUgraphNodeParams(self) -> Any:
        return SimpleNamespace(conditional=SimpleNamespace(phGraph_out=[]))

    def cuGraphAddNode(
        self, graph: Graph, after: list[int], edges: None, count: int, what: Any
    ) -> Any:
        assert len(after) == count and what.type == "conditional"
        own = what.conditional
        assert own.ctx == 7 and (own.type == "switch" or own.size == 1)
        self.kinds.append(own.type)
        own.phGraph_out = [Graph() for _ in range(own.size)]
        return self.answer("node", graph.add((own.handle, *own.phGraph_out), after))

    def cuStreamUpdateCaptureDependencies(
        self, stream: int, after: list[int], edges: None, count: int, flag: int
    ) -> Any:
        assert len(after) == count and flag == 1
        self.streams[stream] = self.streams[stream][0], after
        return self.answer("dependencies")

    def cuStreamBeginCaptureToGraph(
        self, stream: int, graph: Graph, after: None, edges: None, count: int, mode: str
    ) -> Any:
        assert stream not in self.streams, "captures already"
        assert count == 0 and mode == "thread local"
        self.streams[stream] = graph, []
        return self.answer("begin")

    def cuStreamEndCapture(self, stream: int) -> Any:
        return self.answer("end", self.streams.pop(stream)[0])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        before, made.current = made.current, stream.cuda_stream
        yield
        made.current = before

    @contextmanager
    def pooled(pool: object) -> Iterator[None]:
        made.pool = True
        yield
        made.pool = False

    def set_condition(runs: Tensor, handle: int) -> None:
        made.launch(f"set {handle:x} from {runs.tolist()}")

    monkeypatch.setattr(ops_bodies, "load_driver", lambda: made)
    monkeypatch.setattr(ops_bodies, "set_condition", set_condition)
    monkeypatch.setattr(ops_bodies, "_take_workspaces", lambda device: None)
    # They come round: the first one is what is being captured.
    streams = (SimpleNamespace(cuda_stream=number) for number in itertools.cycle((1, 2)))
    stand_ins: dict[str, Any] = {
        "device": lambda device: on(SimpleNamespace(cuda_stream=1)),
        "Stream": lambda: next(streams),
        "MemPool": object,
        "current_stream": lambda: SimpleNamespace(cuda_stream=made.current),
        "is_current_stream_capturing": lambda: made.current in made.streams,
        "stream": on,
        "use_mem_pool": pooled,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    return made


RUNS = torch.tensor([0, 1], dtype=torch.int32)


def test_bodies_become_if_nodes_of_the_graph(cuda: Cuda) -> None:
    bodies = GraphBodies(torch.device("cuda"))
    cuda.launch("before")
    bodies.run_if(RUNS, lambda: cuda.launch("first", "second"))
    cuda.launch("between")
    bodies.run_if(1 - RUNS, lambda: cuda.launch("third"))
    cuda.launch("behind")
    one, two = cuda.handles
    nodes = cuda.graph.nodes
    assert [after for _, after in nodes.values()] == [[], *([n] for n in range(1, 7))]
    names = [what for what, _ in nodes.values()]
    inside = [names.pop(place)[1] for place in (5, 2)][::-1]  # type: ignore[index]
    assert names == [
        ("before", False),
        (f"set {one:x} from [0, 1]", False),
        ("between", False),
        (f"set {two:x} from [1, 0]", False),
        ("behind", False),
    ]
    assert [graph.nodes for graph in inside] == [
        {1: (("first", True), []), 2: (("second", True), [1])},
        {1: (("third", True), [])},
    ]
    assert cuda.streams.keys() == {1}, "no capture of a body is left open"
    assert cuda.kinds == ["if", "if"]


def test_a_loop_becomes_a_while_node(cuda: Cuda) -> None:
    """One body, however often it is to run; what begins the loop and what ends a turn know it."""
    bodies = GraphBodies(torch.device("cuda"))
    cuda.launch("before")
    bodies.run_while(
        RUNS,
        lambda handle: cuda.launch(f"begin {handle:x}"),
        lambda handle: cuda.launch("work", f"end {handle:x}"),
        most=5,
    )
    cuda.launch("behind")
    (handle,) = cuda.handles
    assert cuda.kinds == ["while"]
    (one, _), (two, _), (three, after), (four, last) = cuda.graph.nodes.values()
    assert [one, two, four] == [
        ("before", False),
        (f"begin {handle:x}", False),
        ("behind", False),
    ]
    assert after == [2] and last == [3] and isinstance(three, tuple)
    node, inside = three
    assert node == handle
    assert inside.nodes == {1: (("work", True), []), 2: ((f"end {handle:x}", True), [1])}
    assert cuda.streams.keys() == {1}


def test_before_a_capture_a_loop_takes_all_its_turns(cuda: Cuda) -> None:
    bodies = GraphBodies(torch.device("cuda"))
    cuda.streams.pop(1)
    seen: list[str] = []
    bodies.run_while(
        0 * RUNS,
        lambda handle: seen.append(f"begin {handle}"),
        lambda handle: seen.append(f"turn {handle}"),
        most=3,
    )
    assert seen == ["begin 0", "turn 0", "turn 0", "turn 0"]


def chosen_by(cuda: Cuda) -> Choose:
    def choose(runs: Tensor, switch: Switch | None) -> Chosen:
        cuda.launch("choose" if switch is None else f"choose for {switch.handle:x}, {switch.step}")
        return Chosen(runs, torch.arange(len(runs)), runs.sum()[None])

    return choose


def test_numbers_of_rows_become_a_switch_node(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_bodies, "BOUNDS", 4)
    bodies = GraphBodies(torch.device("cuda"))
    cuda.launch("before")
    runs = torch.ones(10, dtype=torch.int32)
    bodies.run_counted(runs, chosen_by(cuda), lambda chosen: cuda.launch(f"to {chosen.bound}"))
    cuda.launch("behind")
    (handle,) = cuda.handles
    (one, _), (two, _), (three, after), (four, last) = cuda.graph.nodes.values()
    assert (one, two, four) == (
        ("before", False),
        (f"choose for {handle:x}, 4", False),
        ("behind", False),
    )
    assert after == [2] and last == [3]
    assert isinstance(three, tuple) and three[0] == handle
    inside = [graph.nodes for graph in three[1:]]
    assert inside == [{1: ((f"to {bound}", True), [])} for bound in (4, 8, 10)]
    assert cuda.streams.keys() == {1}


def test_few_rows_have_one_body_in_the_graph_itself(cuda: Cuda) -> None:
    runs = torch.ones(ops_bodies.BOUNDS, dtype=torch.int32)
    bodies = GraphBodies(torch.device("cuda"))
    bodies.run_counted(runs, chosen_by(cuda), lambda chosen: cuda.launch(f"to {chosen.bound}"))
    names = [what for what, _ in cuda.graph.nodes.values()]
    assert names == [("choose", False), ("to None", False)]


def test_every_number_of_rows_runs_before_a_capture(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = GraphBodies(torch.device("cuda"))
    cuda.streams.pop(1)
    seen: list[str] = []
    monkeypatch.setattr(cuda, "launch", seen.append)
    runs = torch.zeros(130, dtype=torch.int32)
    bodies.run_counted(runs, chosen_by(cuda), lambda chosen: seen.append(f"to {chosen.bound}"))
    assert seen == ["choose for 0, 64", "to 64", "to 128", "to 130"]


@pytest.mark.parametrize("rows", (65, 640, 768, 769, 8192))
def test_bodies_are_few_and_the_last_is_for_all(rows: int) -> None:
    step, bounds = ops_bodies.bounds_of(rows)
    assert len(bounds) <= ops_bodies.MOST_BODIES and bounds[-1] == rows
    assert step % ops_bodies.BOUNDS == 0 and bounds[:-1] == [
        step * n for n in range(1, len(bounds))
    ]
    # The number that the kernel sets is that of the first body that is large enough.
    for count in range(1, rows + 1):
        own = -(-count // step) - 1
        assert count <= bounds[own] and (own == 0 or bounds[own - 1] < count)


def test_outside_of_a_capture_bodies_run(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = GraphBodies(torch.device("cuda"))
    graph, _ = cuda.streams.pop(1)
    seen: list[str] = []
    monkeypatch.setattr(cuda, "launch", seen.append)
    bodies.run_if(0 * RUNS, lambda: cuda.launch("body"))
    # The kernel is loaded before a capture needs it.
    assert seen == ["set 0 from [0, 0]", "body"] and not graph.nodes


def test_a_body_that_fails_ends_its_capture(cuda: Cuda) -> None:
    bodies = GraphBodies(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        bodies.run_if(RUNS, lambda: 1 // 0)
    assert cuda.streams.keys() == {1}


@pytest.mark.parametrize("what", ["context", "handle", "info", "node", "dependencies", "begin"])
def test_what_the_driver_refuses_is_an_error(cuda: Cuda, what: str) -> None:
    cuda.refused = what
    with pytest.raises(RuntimeError, match="driver refused a graph node: refused"):
        GraphBodies(torch.device("cuda")).run_if(RUNS, lambda: cuda.launch("body"))


def test_without_bindings_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_nodes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"cuda-bindings.*allowed without it: .*EARLY_EXIT"):
        load_driver()
    monkeypatch.setattr(graph_nodes, "find_spec", lambda name: name)
    monkeypatch.setattr(graph_nodes, "import_module", lambda name: SimpleNamespace())
    with pytest.raises(ValueError, match="too old"):
        load_driver()


@pytest.mark.parametrize(
    ("bindings", "version", "expected"),
    [
        (None, 0, False),
        (SimpleNamespace(), 13000, False),
        (SimpleNamespace(CU_GRAPH_COND_TYPE_IF=0), 13000, False),
        (SimpleNamespace(CU_GRAPH_COND_TYPE_SWITCH=2), 12070, False),
        (SimpleNamespace(CU_GRAPH_COND_TYPE_SWITCH=2), 12080, True),
    ],
)
def test_who_has_switch_nodes(
    bindings: Any, version: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimpleNamespace(
        CUgraphConditionalNodeType=bindings,
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        cuDriverGetVersion=lambda: (0, version),
    )
    monkeypatch.setattr(graph_nodes, "find_spec", lambda name: bindings)
    monkeypatch.setattr(graph_nodes, "import_module", lambda name: driver)
    asked = graph_nodes.can_switch.__wrapped__
    assert asked(torch.device("cuda")) is expected
    assert asked(torch.device("cpu")) is False


@pytest.mark.parametrize("handle", [1, 1 << 40, (1 << 64) - 1])
def test_a_handle_keeps_its_bits(handle: int) -> None:
    from fastskip.kernels.conditional import set_condition

    with recording(is_dry=True) as account:
        set_condition(RUNS, handle)
    passed = account.launches[0].arguments["handle"]
    assert passed % (1 << 64) == handle and -(1 << 63) <= passed < 1 << 63


SETTER = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastskip.kernels.compilation import build_of, compile_build, disassemble
from fastskip.kernels.conditional import set_condition
from fastskip.kernels.launch import recording

def build(handle, rows=1):
    with recording(is_dry=True) as account:
        set_condition(torch.empty(rows, dtype=torch.int32, device="meta"), handle)
    return build_of(account.launches[0], 90)

warm, real = build(0), build((1 << 63) + 16)
finding = compile_build(real)
source = ASTSource(real.function, dict(real.signature), dict(real.constants), dict(real.attributes))
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(real.options))
print(json.dumps({
    "is_one": warm.key == real.key,
    "batches": len({build(16, rows).key for rows in (1, 2, 16, 32)}),
    "signature": dict(real.signature),
    "spills": finding.spills,
    "error": finding.error,
    "ptx": compiled.asm["ptx"],
    "machine": disassemble(compiled.asm["cubin"]),
}))
"""
CHOOSER = """
import json
import torch
from fastskip.kernels.compaction import compact
from fastskip.kernels.compilation import build_of, compile_build
from fastskip.kernels.launch import recording
from fastskip.ops.routes import Switch

def build(switch):
    with recording(is_dry=True) as account:
        compact(torch.empty(640, dtype=torch.int32, device="meta"), switch=switch)
    return build_of(account.launches[0], 90)

warm, real, plain = build(Switch(0, 64)), build(Switch((1 << 63) + 16, 64)), build(None)
findings = [compile_build(each) for each in (real, plain)]
print(json.dumps({
    "is_one": warm.key == real.key,
    "spills": [each.spills for each in findings],
    "errors": [each.error for each in findings],
}))
"""


def compiled_by(script: str, folder: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_that_chooses_a_body(tmp_path: Path) -> None:
    found = compiled_by(CHOOSER, tmp_path)
    assert found == {"is_one": True, "spills": [0, 0], "errors": [None, None]}


def test_the_kernel_that_sets_a_condition(tmp_path: Path) -> None:
    found = compiled_by(SETTER, tmp_path)
    assert found["error"] is None and found["spills"] == 0
    assert found["signature"]["handle"] == "i64"
    assert "call.uni (retval0), cudaGraphSetConditional, (param0, param1)" in found["ptx"]
    # One call, of what the driver provides.
    assert found["machine"].count("CALL.ABS") == 1
    assert "cudaGraphSetConditional,@function" in found["machine"]
    # What is compiled before a capture is what the capture launches.
    assert found["is_one"] and found["batches"] == 1
