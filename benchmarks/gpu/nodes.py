"""What a node of a CUDA graph costs when its kernel does nothing, leaves early or is not run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
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

PROGRAMS = (132, 264, 1376)
MANY, FEW = 320, 160
"""The difference of two graphs is taken, so that what a launch of any graph costs drops out."""
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
def _read_kernel(  # type: ignore[no-untyped-def]
    source_ptr, out_ptr, size, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(program * BLOCK, size, programs * BLOCK, num_stages=STAGES):
        total += numerics.load(source_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.sum(total))


def reader(source: Tensor, programs: int) -> Callable[[], object]:
    """Reads ``source`` fp32, whose size is a multiple of the block, by ``programs`` programs."""
    out = torch.empty(programs, device=source.device)
    block = 4096

    def run() -> Tensor:
        _read_kernel[(programs,)](source, out, len(source), BLOCK=block, STAGES=4, num_warps=8)
        return out

    return run


def cost(setting: Setting) -> Values:
    """Microseconds a node."""
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
        raise RuntimeError("a kernel that was to leave early has run")
    try:
        found |= _conditional(setting)
        note = None
    except (ImportError, RuntimeError) as error:
        note = f"conditional nodes are not available: {error}"
    return {"us_per_node": found, "note": note}


def _microseconds(setting: Setting, launch: Callable[[], object]) -> float:
    """A launch's share of a graph of many of them."""
    launch()
    if setting.device.type != "cuda":
        return 0.0

    def replay_seconds(count: int) -> float:
        return _replay_seconds(captured(lambda: [launch() for _ in range(count)]).replay)

    few, many = map(replay_seconds, (FEW, MANY))
    return 1e6 * (many - few) / (MANY - FEW)


def _replay_seconds(replay: Callable[[], object]) -> float:
    times = []
    for _ in range(3 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(times[3:])


def _conditional(setting: Setting) -> dict[str, float]:
    """IF nodes in a row, each with one memset in its body; and plain memsets to compare with.

    torch makes no such nodes before 2.13; CUDA's own bindings do.
    """
    if setting.device.type != "cuda":
        raise RuntimeError("no CUDA device")
    from cuda.bindings import driver  # type: ignore[import-not-found]

    found = {}
    word = torch.zeros(1, dtype=torch.int32, device=setting.device)
    ways: dict[str, Callable[[Any, list[Any]], Any]] = {
        "memset": lambda graph, after: _add_memset(driver, graph, after, word),
        "IF, false": lambda graph, after: _add_if(driver, graph, after, word, 0),
        "IF, true, around a memset": lambda graph, after: _add_if(driver, graph, after, word, 1),
    }
    for name, add in ways.items():
        few, many = (_chain_seconds(driver, add, count) for count in (FEW, MANY))
        found[name] = 1e6 * (many - few) / (MANY - FEW)
    return found


def _chain_seconds(driver: Any, add: Callable[[Any, list[Any]], Any], count: int) -> float:
    graph = _checked(driver, driver.cuGraphCreate(0))
    after: list[Any] = []
    for _ in range(count):
        after = [add(graph, after)]
    runnable = _checked(driver, driver.cuGraphInstantiate(graph, 0))
    stream = torch.cuda.current_stream().cuda_stream
    seconds = _replay_seconds(lambda: _checked(driver, driver.cuGraphLaunch(runnable, stream)))
    synchronize(torch.device("cuda"))
    driver.cuGraphExecDestroy(runnable)
    driver.cuGraphDestroy(graph)
    return seconds


def _add_memset(driver: Any, graph: Any, after: list[Any], word: Tensor) -> Any:
    what = driver.CUDA_MEMSET_NODE_PARAMS()
    what.dst, what.value, what.elementSize, what.width, what.height = word.data_ptr(), 7, 4, 1, 1
    context = _checked(driver, driver.cuCtxGetCurrent())
    return _checked(driver, driver.cuGraphAddMemsetNode(graph, after, len(after), what, context))


def _add_if(driver: Any, graph: Any, after: list[Any], word: Tensor, is_run: int) -> Any:
    context = _checked(driver, driver.cuCtxGetCurrent())
    default = driver.CU_GRAPH_COND_ASSIGN_DEFAULT  # every launch of the graph starts from it
    made = driver.cuGraphConditionalHandleCreate(graph, context, is_run, default)
    what = driver.CUgraphNodeParams()
    what.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    what.conditional.handle = _checked(driver, made)
    what.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
    what.conditional.size = 1
    what.conditional.ctx = context
    # CUDA 13 has one argument more.
    edges = () if int(driver.CUDA_VERSION) < 13000 else (None,)
    node = _checked(driver, driver.cuGraphAddNode(graph, after, *edges, len(after), what))
    _add_memset(driver, what.conditional.phGraph_out[0], [], word)
    return node


def _checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(str(status))
    return values[0] if values else None
