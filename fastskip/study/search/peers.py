"""Published methods as families of policies, each compared at the search's own budget.

A family is a published way of skipping with its parameter left open: the first layer, the number of
layers, the share of rows kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.policy import SkipPolicy, TokenClass
from fastskip.study.search.changes import ATTENTION, BLOCK, Change, policy_of
from fastskip.study.search.greedy_removal import greedy_removal
from fastskip.study.search.matching import Entrant, LeftOut, Match, least_first, over_budget
from fastskip.study.search.visual_contribution import frozen_in

_RATIOS = tuple(round(0.05 * n, 2) for n in range(1, 20))
"""Shares of image rows that removals may keep."""


@dataclass(frozen=True)
class Known:
    """The measurements that peers' rules need.

    Attributes:
        influence: of each block (`block_influence`); empty if it was not measured.
        contribution: of each layer to the answers through its image rows
            (`visual_contribution`); empty for text-only models.
        loss: of a policy on the calibration set, nats per answer token.
    """

    influence: Mapping[int, float]
    contribution: Mapping[int, float]
    loss: Callable[[SkipPolicy], float]


def peers(match: Match, known: Known) -> Iterator[Entrant | LeftOut]:
    """Every peer at the budget, or why it is left out."""
    depth, has_images = match.shape.depth, match.shape.has_images
    if has_images:
        for name, family in (_families(depth) | _removals(depth)).items():
            yield match.nearest(name, "peer", family)
        yield _by_order(match, "shortv", known.contribution, frozen_in)
    for name in ("parallel_blocks", "block_pairs"):
        yield match.nearest(name, "peer", _arranged(name, depth))
    if known.influence:
        yield _by_order(match, "shortgpt", known.influence, without_blocks)
    else:
        yield LeftOut("shortgpt", "hidden states were not compared")
    gone = greedy_removal(
        depth,
        lambda layers: known.loss(without_blocks(sorted(layers))),
        lambda layers: match.fits(without_blocks(sorted(layers))),
    )
    if gone is None:
        yield LeftOut("sleb", "skipping all blocks does not meet the budget")
    elif not gone:
        yield LeftOut("sleb", "dense meets the budget")
    else:
        yield Entrant("sleb", "peer", without_blocks(sorted(gone), "sleb"))


def without_blocks(layers: Sequence[int], name: str = "shortgpt") -> SkipPolicy:
    """The policy that skips these blocks for all tokens."""
    every = Change(frozenset(TokenClass), BLOCK)
    if not layers:
        return SkipPolicy(name=name)
    rules = policy_of((layer, (every,)) for layer in layers).rules
    # "all" means the model's own classes, whether or not it has images
    return SkipPolicy.from_dict(
        {
            "schema_version": 1,
            "name": name,
            "rules": [{**rule.to_dict(), "tokens": "all"} for rule in rules],
        }
    )


def _families(depth: int) -> dict[str, list[SkipPolicy]]:
    image = frozenset({TokenClass.IMAGE})

    def from_layer(change: Change, name: str) -> list[SkipPolicy]:
        return [
            policy_of(((n, (change,)) for n in range(first, depth)), name) for first in range(depth)
        ]

    def preset(name: str, **options: Sequence[int]) -> list[SkipPolicy]:
        ((option, values),) = options.items()
        extra = {"end": depth} if option == "start" else {}
        return [SkipPolicy.preset(name, **{option: n}, **extra) for n in values]

    return {
        "visual_withdrawal": preset("visual_withdrawal", after=range(depth - 1)),
        "frozen_visual": preset("frozen_visual", start=range(depth)),
        "image_ffn": preset("image_ffn", start=range(depth)),
        "v_skip": from_layer(Change(image, ATTENTION), "v_skip"),
    }


def _removals(depth: int) -> dict[str, list[SkipPolicy]]:
    """The presets that remove image rows."""
    after = range(min(depth - 1, max(2, depth // 2 + 1)))
    single = [{"after": n, "ratio": ratio} for n in after for ratio in _RATIOS]
    # PyramidDrop's rows leave before the first layer of each later quarter
    quarters = [tuple(depth * k // 4 - 1 for k in ks) for ks in ((1, 2, 3), (2, 3), (1, 2))]
    wanted = [*quarters, (1, depth // 2), (1,), (1, 2, 3)]
    stages = sorted({tuple(sorted({n for n in own if 0 <= n < depth - 1})) for own in wanted})
    staged = [
        {"stages": list(stage), "ratio": ratio} for stage in stages if stage for ratio in _RATIOS
    ]
    options: dict[str, list[dict[str, Any]]] = {
        "fastv": single,
        "pyramid_drop": staged,
        "random_removal": single,
        "even_removal": single,
    }
    return {
        name: [SkipPolicy.preset(name, **own) for own in every] for name, every in options.items()
    }


def _arranged(name: str, depth: int) -> list[SkipPolicy]:
    last = depth if name == "parallel_blocks" else depth - depth % 2
    step = 1 if name == "parallel_blocks" else 2
    return [SkipPolicy.preset(name, start=n, end=last) for n in range(0, last, step)]


def _by_order(
    match: Match,
    name: str,
    worth: Mapping[int, float],
    make: Callable[[Sequence[int]], SkipPolicy],
) -> Entrant | LeftOut:
    """The fewest layers that meet the budget, those worth least first."""
    if not worth:
        return LeftOut(name, "no measurements to order layers by")
    order = least_first(worth)
    every = [make(sorted(order[: count + 1])) for count in range(len(order))]
    found = next((policy for policy in every if match.fits(policy)), None)
    if found is not None:
        return Entrant(name, "peer", found)
    return over_budget(name, min(match.share(policy) for policy in every), match.limit)
