"""FLOPs and bytes of a batch whose sequences are not alike, from those of each alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from fastskip.costs import Cost, GenerationCost, Operation

Key = tuple[str, int | None, int]


def mixed_cost(costs: Sequence[GenerationCost]) -> GenerationCost:
    """The cost of a batch of sequences with these costs: weights are read once for all of them."""
    return GenerationCost(
        _together([each.prefill for each in costs]), _together([each.decode for each in costs])
    )


def _together(costs: Sequence[Cost]) -> Cost:
    found: dict[Key, Operation] = {}
    for cost in costs:
        for key, own in _by_key(cost).items():
            other = found.get(key, Operation(key[0], key[1], times=own.times))
            found[key] = Operation(
                own.kind,
                own.layer,
                other.flops + own.flops,
                max(other.weight_bytes, own.weight_bytes),
                other.kv_read_bytes + own.kv_read_bytes,
                other.kv_written_bytes + own.kv_written_bytes,
                own.times,
            )
    return Cost(tuple(found.values()), costs[0].steps)


def _by_key(cost: Cost) -> dict[Key, Operation]:
    """The operations of one sequence, so named that those of other sequences find them.

    Whether q, k and v are one product depends on a sequence's classes: they count as one.
    """
    found: dict[Key, Operation] = {}
    seen: dict[tuple[str, int | None], int] = defaultdict(int)
    for own in cost.ops:
        name = own.kind, own.layer
        key = (*name, 0 if own.kind == "qkv" else seen[name])
        seen[name] += 1
        other = found.get(key)
        found[key] = own if other is None else _added(own, other)
    return found


def _added(a: Operation, b: Operation) -> Operation:
    return Operation(
        a.kind,
        a.layer,
        a.flops + b.flops,
        a.weight_bytes + b.weight_bytes,
        a.kv_read_bytes + b.kv_read_bytes,
        a.kv_written_bytes + b.kv_written_bytes,
        a.times,
    )
