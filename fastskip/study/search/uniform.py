"""What needs no search: every n-th layer at every offset, and layers drawn at random."""

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
"""Whether a preset says what a row leaves that skips."""


def uniform(match: Match) -> Iterator[Entrant | LeftOut]:
    """Of every sublayer and scope the interval that the budget allows, at its best offset."""
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
                # further on there is one layer, as at every interval
                if start + interval < shape.depth or interval == 1
            ]
            yield match.nearest(f"{preset} {scope}", "uniform", family)


def at_random(match: Match, seed: int) -> Entrant | LeftOut:
    """Changes drawn at random until the budget is kept; no wirings."""
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
        # What was drawn before gives way, if more is saved so.
        others = [x for x in taken.get(layer, ()) if not x.tokens & change.tokens]
        tried = {**taken, layer: (*others, change)}
        following = policy_of(sorted(tried.items()), name)
        if match.share(following) < match.share(policy) - 1e-9:
            taken, policy = tried, following
    if not match.fits(policy):
        return LeftOut(name, "what was drawn saves too little")
    return Entrant(name, "random", policy)
