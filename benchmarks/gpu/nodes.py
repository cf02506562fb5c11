"""What a CUDA graph node costs when its kernel does nothing, exits early or does not run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.cells import Setting
from benchmarks.gpu.results import Values
from benchmarks.gpu.timing import captured, synchronize
from fastskip.kernels import numerics
from fastskip.ops.bodies import GraphBodies
from fastskip.ops.conditions import set_condition
from fastskip.ops.graph_nodes import NodeKind, add_node, checked, load_driver, new_handle
from fastskip.ops.graphs import capture

PROGRAMS = (132, 264, 1376)
MANY, FEW = 320, 160
"""Nodes of two graphs, whose difference is taken: the cost of launching a graph cancels out."""
REPLAYS = 30


@triton.jit
def _empty_kernel(unused_ptr):  # type: ignore[no-untyped-def]
    pass


@triton.jit
def _early_exit_kernel(flag_ptr, out_ptr):  # type: ignore[no-untyped-def]
    if tl.load(flag_ptr) == 0:
        return
    tl.store(out_ptr + tl.program_id(0), 1)


@triton.jit
def _count_kernel(left_ptr, taken_ptr):  # type: ignore[no-untyped-def]
    left = tl.load(left_ptr)
    if left != 0:
        tl.store(left_ptr, left - 1)
        tl.store(taken_ptr, tl.load(taken_ptr) + 1)


@triton.jit
def _read_kernel(  # type: ignore[no-untyped-def]
    source_ptr, out_ptr, size, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(program * BLOCK, size, programs * BLOCK, num_stages=STAGES):
        total += numerics.load(source_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.sum(total))


def reader(source: Tensor, programs: int) -> Callable[[], object]:
    """A call of ``programs`` programs that read ``source``: fp32, a multiple of the block."""
    out = torch.empty(programs, device=source.device)
    block = 4096

    def run() -> Tensor:
        _read_kernel[(programs,)](source, out, len(source), BLOCK=block, STAGES=4, num_warps=8)
        return out

    return run


def cost(setting: Setting) -> Values:
    """Microseconds per node."""
    flag = torch.zeros(1, dtype=torch.int32, device=setting.device)
    out = torch.zeros(max(PROGRAMS), dtype=torch.int32, device=setting.device)
    found: dict[str, float] = {}
    for programs in (2,) if setting.is_tiny else (1, *PROGRAMS):
        found[f"empty, {programs} programs"] = _microseconds(
            setting, partial(_empty_kernel[(programs,)], flag)
        )
        found[f"early exit, {programs} programs"] = _microseconds(
            setting, partial(_early_exit_kernel[(programs,)], flag, out)
        )
    if int(out.sum()) != 0:
        raise RuntimeError("a kernel that should have exited early has run")
    if setting.device.type != "cuda":
        return {"us_per_node": found, "note": "conditional nodes are not available: no CUDA device"}
    nodes = {"IF nodes": _conditional, "captured bodies": _captured_bodies, "loops": _turns}
    more, faults = each_of(nodes, setting.device)
    return {"us_per_node": found | more, "note": "; ".join(faults) or None}


def each_of(
    parts: Mapping[str, Callable[[torch.device], dict[str, float]]], device: torch.device
) -> tuple[dict[str, float], list[str]]:
    """What all parts found, and why some of them failed."""
    found: dict[str, float] = {}
    faults = []
    for name, part in parts.items():
        try:
            found |= part(device)
        except Exception as error:  # the driver's, the compiler's, or a wrong result
            faults.append(f"{name}: {type(error).__name__}: {error}")
    return found, faults


def _microseconds(setting: Setting, launch: Callable[[], object]) -> float:
    """Microseconds per launch, in a graph of many."""
    launch()
    if setting.device.type != "cuda":
        return 0.0

    def taken(count: int) -> float:
        return replay_seconds(captured(lambda: [launch() for _ in range(count)]).replay)

    few, many = map(taken, (FEW, MANY))
    return 1e6 * (many - few) / (MANY - FEW)


def replay_seconds(replay: Callable[[], object]) -> float:
    """Median seconds of one replay."""
    times = []
    for _ in range(3 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(times[3:])


def _conditional(device: torch.device) -> dict[str, float]:
    """IF nodes in a row, each with one memset in its body, and plain memsets to compare with."""
    driver = load_driver()
    found = {}
    word = torch.zeros(1, dtype=torch.int32, device=device)
    ways: dict[str, Callable[[Any, list[Any]], Any]] = {
        "memset": lambda graph, after: _add_memset(driver, graph, after, word),
        "IF, false": lambda graph, after: _add_if(driver, graph, after, word, 0),
        "IF, true, around a memset": lambda graph, after: _add_if(driver, graph, after, word, 1),
    }
    for name, add in ways.items():
        few, many = (_chain_seconds(driver, add, count) for count in (FEW, MANY))
        found[name] = 1e6 * (many - few) / (MANY - FEW)
    return found


def _captured_bodies(device: torch.device) -> dict[str, float]:
    """IF nodes as a step uses them: each around a kernel of one program, with the kernel that sets
    its condition.

    Raises:
        RuntimeError: a body ran that should not have, or the other way round.
    """
    bodies, found = GraphBodies(device), {}
    runs, one, out = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(3))
    one.fill_(1)

    def work(count: int) -> None:
        for _ in range(count):
            bodies.run_if(runs, lambda: _early_exit_kernel[(1,)](one, out))

    graphs = [capture(partial(work, count), device) for count in (FEW, MANY)]
    for name, flag in (("false", 0), ("true", 1)):
        runs.fill_(flag)
        out.zero_()
        few, many = map(replay_seconds, graphs)
        found[f"IF and the kernel that sets it, {name}"] = 1e6 * (many - few) / (MANY - FEW)
        if int(out) != flag:
            raise RuntimeError(f"the body of an IF node with flag {flag} wrote {int(out)}")
    return found


def _turns(device: torch.device) -> dict[str, float]:
    """A turn of a loop: the WHILE node, a kernel of one program, and one that sets the loop's
    condition.

    Raises:
        RuntimeError: the number of turns was wrong.
    """
    bodies = GraphBodies(device)
    left, taken = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))

    def take_turn(condition: int) -> None:
        _count_kernel[(1,)](left, taken)
        set_condition(left, condition)

    def work(count: int) -> None:
        left.fill_(count)
        bodies.run_while(left, partial(set_condition, left), take_turn, count)

    seconds = []
    for count in (FEW, MANY):
        replay = capture(partial(work, count), device)
        taken.zero_()
        replay()
        if int(taken) != count:
            raise RuntimeError(f"a loop took {int(taken)} turns instead of {count}")
        seconds.append(replay_seconds(replay))
    few, many = seconds
    return {"a turn of a WHILE node, two kernels": 1e6 * (many - few) / (MANY - FEW)}


def _chain_seconds(driver: Any, add: Callable[[Any, list[Any]], Any], count: int) -> float:
    graph = checked(driver, driver.cuGraphCreate(0))
    after: list[Any] = []
    for _ in range(count):
        after = [add(graph, after)]
    runnable = checked(driver, driver.cuGraphInstantiate(graph, 0))
    stream = torch.cuda.current_stream().cuda_stream
    seconds = replay_seconds(lambda: checked(driver, driver.cuGraphLaunch(runnable, stream)))
    synchronize(torch.device("cuda"))
    driver.cuGraphExecDestroy(runnable)
    driver.cuGraphDestroy(graph)
    return seconds


def _add_memset(driver: Any, graph: Any, after: list[Any], word: Tensor) -> Any:
    what = driver.CUDA_MEMSET_NODE_PARAMS()
    what.dst, what.value, what.elementSize, what.width, what.height = word.data_ptr(), 7, 4, 1, 1
    context = checked(driver, driver.cuCtxGetCurrent())
    return checked(driver, driver.cuGraphAddMemsetNode(graph, after, len(after), what, context))


def _add_if(driver: Any, graph: Any, after: list[Any], word: Tensor, is_run: int) -> Any:
    """Every launch of the graph starts with the condition ``is_run``."""
    handle = new_handle(driver, graph, is_run)
    node, (inside,) = add_node(driver, graph, after, handle, NodeKind.IF, 1)
    _add_memset(driver, inside, [], word)
    return node
