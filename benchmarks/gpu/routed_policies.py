"""Policies with routers for the GPU protocol, and static ones that skip as much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import evenly
from fastskip.generation.guarding import Guarding
from fastskip.policy import SkipPolicy
from fastskip.routing.weights import LayerScore, write_weights

GROUPS = ("row", "sequence", "batch")
KIND_OF = {
    Guarding.EARLY_EXIT: "early exits",
    Guarding.CONDITIONAL: "IF nodes",
    Guarding.HOPS: "loop",
}


def router(rate: float, kv: str, group: str = "row", layers: object = ":") -> dict[str, Any]:
    """Skips whole blocks of all rows at random."""
    head = {"layers": layers, "tokens": "all", "skip": ["block"], "kind": "random"}
    return head | {"rate": rate, "kv": kv, "group": group}


def policy_of(*routers: dict[str, Any], rules: Sequence[dict[str, Any]] = ()) -> SkipPolicy:
    document = {"schema_version": 1, "rules": list(rules), "routers": list(routers)}
    return SkipPolicy.from_dict(document)


def static(rate: float, kv: str, depth: int) -> SkipPolicy:
    """Skips whole blocks of all rows, evenly spread, as many as come nearest to the rate."""
    layers = evenly(rate, depth)
    return policy_of(rules=[{"layers": layers, "tokens": "all", "skip": ["block"], "kv": kv}])


def linear(threshold: float, depth: int, width: int, folder: Path) -> dict[str, Any]:
    """A linear router with random weights: at threshold 0 it skips about half of the layers."""
    generator = torch.Generator().manual_seed(0)
    path = folder.absolute() / f"router-{depth}-{width}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vectors = torch.randn(depth, width, generator=generator) * width**-0.5
        write_weights(path, {layer: LayerScore(own, 0.0) for layer, own in enumerate(vectors)})
    head = {"layers": ":", "tokens": "all", "skip": ["block"], "kind": "linear", "kv": "omit"}
    return head | {"weights": str(path), "threshold": threshold}
