"""The solver against all solutions there are."""

from collections.abc import Iterator

import numpy as np
import pytest

from fastskip.policy import Arrangement, SkippedKV, TokenClass
from fastskip.study.search.changes import BLOCK, FFN, Change, Choice
from fastskip.study.search.solver import Offer, Solution, most_saved, solve, worthwhile

EVERY = frozenset(TokenClass)
PAIR = (Change(EVERY, arrangement=Arrangement.PAIR),)
CHOICES: tuple[Choice, ...] = (
    (),
    (Change(EVERY, FFN),),
    (Change(EVERY, BLOCK, SkippedKV.PROJECT),),
    (Change(frozenset({TokenClass.IMAGE}), FFN),),
)


def all_solutions(offers: list[Offer], depth: int, layer: int = 0) -> Iterator[Solution]:
    if layer == depth:
        yield ()
        return
    for offer in offers:
        if offer.layer == layer:
            for rest in all_solutions(offers, depth, offer.layers.stop):
                yield (offer, *rest)


def drawn(seed: int, depth: int) -> list[Offer]:
    rng = np.random.default_rng(seed)
    offers = [Offer(layer, (), 0.0, 0.0) for layer in range(depth)]
    for layer in range(depth):
        for choice in CHOICES[1:]:
            offers.append(Offer(layer, choice, float(rng.exponential()), float(rng.random())))
        if layer + 1 < depth and rng.random() < 0.7:
            offers.append(Offer(layer, PAIR, float(rng.exponential()), float(rng.random())))
    return offers


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_better(seed: int) -> None:
    depth = 2 + seed % 4
    offers = drawn(seed, depth)
    every = list(all_solutions(offers, depth))
    most = max(sum(o.saved for o in own) for own in every)
    assert most_saved(offers, depth) == pytest.approx(most)
    for share in (0.0, 0.3, 0.6, 0.9, 0.999):
        least = share * most
        best = min(sum(o.kl for o in own) for own in every if sum(o.saved for o in own) >= least)
        for given in (offers, worthwhile(offers, depth)):
            found = solve(given, depth, least)
            assert found is not None
            assert [n for o in found for n in o.layers] == list(range(depth))
            assert sum(o.saved for o in found) >= least - 1e-6
            assert sum(o.kl for o in found) == pytest.approx(best, abs=1e-6)
    assert solve(offers, depth, most + 0.01) is None
