"""Policies as plain data: every cell of the semantics table, and cells mixed."""

from collections.abc import Mapping
from typing import Any

Policy = dict[str, Any]


def policy_of(
    *rules: Mapping[str, Any], arrangements: tuple[Mapping[str, Any], ...] = ()
) -> Policy:
    """The plain data of a policy file."""
    return {"schema_version": 1, "rules": list(rules), "arrangements": list(arrangements)}


def skip(layers: Any, tokens: Any, *sublayers: str, kv: str | None = None) -> Policy:
    """One rule."""
    rule = {"layers": layers, "tokens": tokens, "skip": list(sublayers)}
    return rule if kv is None else rule | {"kv": kv}


def parallel(layers: Any, norm: str = "own") -> Policy:
    return {"layers": layers, "kind": "parallel", "norm": norm}


def pair(layers: Any, combine: str = "sum") -> Policy:
    return {"layers": layers, "kind": "pair", "combine": combine}


LAYERS = {"first": [0], "middle": [1, 2], "last": [3], "all": ":"}
KV = ("project", "reuse", "omit")
CELLS = {
    "ffn": ("ffn", None),
    **{f"attention-{kv}": ("attention", kv) for kv in KV},
    **{f"block-{kv}": ("block", kv) for kv in KV},
}
MIXED = {
    "no attention anywhere": policy_of(skip(":", "all", "attention")),
    "nothing at all": policy_of(skip(":", "all", "block", kv="reuse")),
    "reuse of a copy": policy_of(skip("1:3", ["image", "text"], "attention", kv="reuse")),
    "reuse over an empty layer": policy_of(
        skip([1], "all", "attention"), skip([2], ["text"], "block", kv="reuse")
    ),
    "reuse without a source": policy_of(
        skip([0], "all", "attention"), skip([1], ["image"], "attention", kv="reuse")
    ),
    "each class its own rule": policy_of(
        skip([1, 3], ["image"], "block", kv="omit"),
        skip([1, 2], ["text"], "attention", kv="reuse"),
        skip([2, 3], ["generated"], "attention", "ffn", kv="project"),
        skip("0:2", ["generated"], "ffn"),
    ),
    "parallel, own": policy_of(arrangements=(parallel(":"),)),
    "parallel, shared": policy_of(arrangements=(parallel(":", "shared"),)),
    "parallel, skipped branches": policy_of(
        skip([0, 3], ["image"], "ffn"),
        skip([1, 3], ["text"], "attention", kv="omit"),
        skip([2], ["generated"], "block", kv="reuse"),
        arrangements=(parallel([0, 1]), parallel([2, 3], "shared")),
    ),
    "parallel, last layer skipped": policy_of(
        skip([3], ["text", "generated"], "block"), arrangements=(parallel([3]),)
    ),
    "pair, sum": policy_of(arrangements=(pair([[1, 2]]),)),
    "pair, mean": policy_of(arrangements=(pair([[1, 2]], "mean"),)),
    "pairs to the end": policy_of(arrangements=(pair("0:2"), pair([[2, 3]], "mean"))),
    "pair and skips": policy_of(
        skip([0], ["image"], "block"),
        skip([3], ["text"], "attention", kv="reuse"),
        arrangements=(pair([[1, 2]]), parallel([3])),
    ),
}


def cell_policy(cell: str, token_class: str, layers: str) -> Policy:
    """One cell: what one class leaves out in some layers; keys of `CELLS` and `LAYERS`."""
    sublayers, kv = CELLS[cell]
    return policy_of(skip(LAYERS[layers], [token_class], sublayers, kv=kv))
