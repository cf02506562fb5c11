"""Baselines that need no search: every n-th layer at every offset, and layers drawn at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastskip.policy import SkippedKV, SkipPolicy
from fastskip.study.search.changes import Change, changes_of, policy_of
from fastskip.study.search.matching import Entrant, LeftOut, Match

_PRESETS = {
    "every_nth_block": True,
    "every_nth_ffn": False,
    "every_nth_attention": True,
}
"""Presets, and whether each takes a KV rule for the rows that skip."""


def uniform(match: Match) -> Iterator[Entrant | LeftOut]:
    """For every sublayer and scope, the interval that the budget allows, at its best offset."""
    shape = match.shape
    for preset, has_kv in _PRESETS.items():
        for scope in ("all", *(c.value for c in shape.classes)):
            kvs = (SkippedKV.PROJECT, SkippedKV.OMIT) if has_kv and scope != "all" else (None,)
            family = [
                SkipPolicy.preset(
                    preset,
                    interval=interval,
                    start=start,
                    end=shape.depth,
                    scope=scope,
                    **({} if kv is None else {"kv": kv.value}),
                )
                for kv in kvs
                for interval in range(1, shape.depth + 1)
                for start in range(shape.depth)
                # a later start would select one layer only, whatever the interval
                if start + interval < shape.depth or interval == 1
            ]
            yield match.nearest(f"{preset} {scope}", "uniform", family)


def at_random(match: Match, seed: int) -> Entrant | LeftOut:
    """Changes drawn at random until they meet the budget; no wirings."""
    name, shape = f"random {seed}", match.shape
    rng = np.random.default_rng(seed)
    places = [
        (layer, change)
        for layer in range(shape.depth)
        for change in changes_of(layer, shape.depth, shape.classes, wirings=False)
        if len(change.tokens) == 1 and change.kv is not SkippedKV.REUSE
    ]
    taken: dict[int, tuple[Change, ...]] = {}
    policy = SkipPolicy(name=name)
    for number in rng.permutation(len(places)):
        if match.fits(policy):
            break
        layer, change = places[int(number)]
        # It replaces what was drawn before for these rows, if that saves more.
        others = [x for x in taken.get(layer, ()) if not x.tokens & change.tokens]
        tried = {**taken, layer: (*others, change)}
        following = policy_of(sorted(tried.items()), name)
        if match.share(following) < match.share(policy) - 1e-9:
            taken, policy = tried, following
    if not match.fits(policy):
        return LeftOut(name, "all changes drawn save too little")
    return Entrant(name, "random", policy)
