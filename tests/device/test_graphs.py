"""What surrounds a capture, on stand-ins for CUDA's graphs and streams."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastskip.decoder.fused.kept_graphs import Graphs
from fastskip.ops import graphs
from fastskip.ops.graphs import Pool

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins: dict[str, Any] = {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "current_device": lambda: 0,
        "current_stream": lambda: stream,
        "device": lambda device: nullcontext(),
        "graph": lambda graph, **options: nullcontext(),
        "graph_pool_handle": object,
        "Stream": lambda device: object(),
        "set_stream": lambda stream: None,
        "stream": lambda stream: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    monkeypatch.setattr(graphs, "_side_stream", lambda device: stream)


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_during_a_capture(
    collects: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage may hold graphs, and one that is destroyed during a capture would end it."""
    monkeypatch.setattr(graphs, "_WARM_UPS", 0)
    seen = []

    def work() -> None:
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("planted")

    was_enabled = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(RuntimeError, match="planted") if fails else nullcontext():
            graphs.capture(work, CUDA)
        assert seen == [False] and gc.isenabled() == collects
    finally:
        (gc.enable if was_enabled else gc.disable)()


def make(kept: Graphs[str, Pool], key: str) -> Pool:
    """The pool that a graph is made with; a capture for the key "bad" fails."""

    def build(pool: Pool | None) -> Pool:
        assert pool is not None
        if key == "bad":
            raise RuntimeError("planted")
        return pool

    return kept.make(key, CUDA, build)


def test_graphs_of_separate_memory_share_no_stream() -> None:
    """A stream's workspace lies in the memory of the graph that needed one first, and to torch it
    goes with any graph that was captured there."""
    one, other = Graphs[str, Pool](4), Graphs[str, Pool](4)
    pools = [make(kept, key) for kept in (one, other) for key in ("first", "second")]
    assert pools[0] is pools[1] and pools[2] is pools[3]
    assert pools[0].memory is not pools[2].memory and pools[0].stream is not pools[2].stream


def test_streams_are_kept_when_graphs_are_dropped() -> None:
    """torch hands out few: with a new one for each policy, all would soon be shared."""
    kept = Graphs[str, Pool](4)
    pools = [make(kept, "a")]
    for version in range(3):
        kept.renew(version)
        pools.append(make(kept, "a"))
    assert len({id(pool.stream) for pool in pools}) == 1
    assert len({id(pool.memory) for pool in pools}) == len(pools)


def test_a_failed_capture_costs_the_graphs_after_it_nothing() -> None:
    """To torch 2.11 a capture that ended in an error goes on: its pool serves no other one."""
    kept = Graphs[str, Pool](4)
    first = make(kept, "first")
    with pytest.raises(RuntimeError, match="planted"):
        make(kept, "bad")
    later = [make(kept, key) for key in ("second", "third")]
    assert later[0] is later[1] and kept.get("first") is first
    assert later[0].memory is not first.memory and later[0].stream is not first.stream


def test_a_capture_without_a_pool_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_WARM_UPS", 0)
    given: list[dict[str, Any]] = []

    def graph(graph: object, **options: Any) -> Any:
        given.append(options)
        return nullcontext()

    monkeypatch.setattr("torch.cuda.graph", graph)
    pool = Pool.on(CUDA)
    assert pool is not None
    for each in (pool, pool, None, None):
        graphs.capture(lambda: None, CUDA, each)
    assert len({id(options["stream"]) for options in given}) == 3
    assert len({id(options["pool"]) for options in given}) == 3
    assert given[0]["pool"] is pool.memory and given[0]["stream"] is pool.stream


def test_where_there_are_no_graphs_there_is_no_pool() -> None:
    kept: Graphs[str, list[Pool | None]] = Graphs(4)
    cpu = torch.device("cpu")
    assert kept.make("a", cpu, lambda pool: [pool]) == [None]
    kept.clear()
    assert kept.make("a", cpu, lambda pool: [pool]) == [None]
