"""Conditional nodes of CUDA graphs, through NVIDIA's Python bindings.

torch creates IF nodes from 2.13 on; the bindings (``cuda-bindings``, which torch's CUDA 13 wheels
install) create them, and SWITCH nodes, with torch 2.11 too.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

MODULE = "cuda.bindings.driver"


class NodeKind(Enum):
    """What a node does with its condition; the value is the driver's name for it.

    ``IF``: runs its only body unless the condition is 0. ``WHILE``: repeats it until the condition
    is 0. ``SWITCH``: runs the body whose number the condition is; none, if there is no such body.
    """

    IF = "CU_GRAPH_COND_TYPE_IF"
    WHILE = "CU_GRAPH_COND_TYPE_WHILE"
    SWITCH = "CU_GRAPH_COND_TYPE_SWITCH"


@cache
def can_switch(device: torch.device) -> bool:
    """Whether graphs on a device can have SWITCH nodes: that takes CUDA 12.8 and its bindings."""
    if device.type != "cuda" or not _has_bindings():
        return False
    driver = import_module(MODULE)
    kinds = getattr(driver, "CUgraphConditionalNodeType", None)
    is_known = hasattr(kinds, NodeKind.SWITCH.value)
    return is_known and int(checked(driver, driver.cuDriverGetVersion())) >= 12080


def _has_bindings() -> bool:
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def load_driver() -> Any:
    """CUDA's driver API.

    Raises:
        ValueError: the bindings are not installed, or predate IF nodes.
    """
    needed = (
        "conditional graph nodes need the cuda-bindings package (pip install 'cuda-bindings>=13', "
        "for the driver's CUDA version); allowed without it: Guarding.EARLY_EXIT, no switches"
    )
    if not _has_bindings():
        raise ValueError(f"guarding: {needed}")
    driver = import_module(MODULE)
    if not hasattr(driver, "cuStreamBeginCaptureToGraph"):
        raise ValueError(f"guarding: {MODULE} is too old: {needed}")
    return driver


def new_handle(driver: Any, graph: Any, default: int = 0) -> Any:
    """A condition of ``graph``, which is ``default`` at the start of every launch."""
    context = checked(driver, driver.cuCtxGetCurrent())
    flag = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
    return checked(driver, driver.cuGraphConditionalHandleCreate(graph, context, default, flag))


def add_node(
    driver: Any, graph: Any, after: list[Any], handle: Any, kind: NodeKind, bodies: int
) -> tuple[Any, list[Any]]:
    """Adds a conditional node after the nodes ``after``; returns it and its bodies' graphs."""
    what = driver.CUgraphNodeParams()
    what.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    what.conditional.handle = handle
    kinds = driver.CUgraphConditionalNodeType
    what.conditional.type = getattr(kinds, kind.value)
    what.conditional.size = bodies
    what.conditional.ctx = checked(driver, driver.cuCtxGetCurrent())
    made = driver.cuGraphAddNode(graph, after, *edges_of(driver), len(after), what)
    return checked(driver, made), [what.conditional.phGraph_out[each] for each in range(bodies)]


def checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    """What a driver call returned.

    Raises:
        RuntimeError: the call failed.
    """
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver refused a graph node: {status}")
    return values[0] if values else None


def edges_of(driver: Any) -> tuple[None, ...]:
    """CUDA 13 takes one more argument for dependencies, which is not used here."""
    return () if int(driver.CUDA_VERSION) < 13000 else (None,)
