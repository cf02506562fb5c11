"""FLOPs and bytes of a heterogeneous batch, from those of homogeneous batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fastskip.plan.costs import Cost, GenerationCost, Operation

Key = tuple[str, int | None, int]


def mixed_cost(costs: Sequence[GenerationCost]) -> GenerationCost:
    """The cost of a batch of different sequences.

    Each is given by the cost of a batch of equal size made of copies of it. Each weight counts as
    read once for the whole batch; under routers, by the largest of the sequences' expected bytes.
    """
    return GenerationCost(
        _together([each.prefill for each in costs]), _together([each.decode for each in costs])
    )


def _together(costs: Sequence[Cost]) -> Cost:
    found: dict[Key, Operation] = {}
    for cost in costs:
        for key, own in _by_key(cost).items():
            other = found.get(key)
            if other is not None:
                own = _added(own, other, max(own.weight_bytes, other.weight_bytes))
            found[key] = own
    return Cost(tuple(_share(own, len(costs)) for own in found.values()), costs[0].steps)


def _by_key(cost: Cost) -> dict[Key, Operation]:
    """The operations of one homogeneous batch, under keys that match those of the other batches.

    Whether Q, K and V form one GEMM depends on a sequence's classes, so they count as one.
    """
    found: dict[Key, Operation] = {}
    seen: dict[tuple[str, int | None], int] = defaultdict(int)
    for own in cost.ops:
        name = own.kind, own.layer
        key = (*name, 0 if own.kind == "qkv" else seen[name])
        seen[name] += 1
        other = found.get(key)
        if other is not None:
            own = _added(own, other, own.weight_bytes + other.weight_bytes)
        found[key] = own
    return found


def _added(a: Operation, b: Operation, weight_bytes: int) -> Operation:
    """Both operations as one, run as often as each."""
    return replace(
        a,
        flops=a.flops + b.flops,
        weight_bytes=weight_bytes,
        kv_read_bytes=a.kv_read_bytes + b.kv_read_bytes,
        kv_written_bytes=a.kv_written_bytes + b.kv_written_bytes,
    )


def _share(own: Operation, count: int) -> Operation:
    """One of ``count`` equal shares of all but the weights."""
    return replace(
        own,
        flops=own.flops // count,
        kv_read_bytes=own.kv_read_bytes // count,
        kv_written_bytes=own.kv_written_bytes // count,
    )
