"""What surrounds a capture, on stand-ins for CUDA's graphs and streams."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastskip.decoder.fused.kept_graphs import Graphs
from fastskip.ops import graphs

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
        "set_stream": lambda stream: None,
        "stream": lambda stream: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    for name in ("_side_stream", "_capture_stream"):
        monkeypatch.setattr(graphs, name, lambda device: stream)


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


def test_a_failed_capture_costs_the_graphs_after_it_nothing() -> None:
    """To torch 2.11 a capture that ended in an error goes on: its pool serves no other one."""
    kept: Graphs[str, object] = Graphs(4)
    pools = []

    def build(pool: object) -> object:
        pools.append(pool)
        if len(pools) == 2:
            raise RuntimeError("planted")
        return pool

    first = kept.make("first", CUDA, build)
    with pytest.raises(RuntimeError, match="planted"):
        kept.make("bad", CUDA, build)
    later = [kept.make(key, CUDA, build) for key in ("bad", "last")]
    assert pools[1] is first and later[0] is later[1] is not first
    assert kept.get("first") is first
