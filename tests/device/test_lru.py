"""What is kept in a bounded map, and what is worth a place in it."""

import random

from fastskip.decoder.fused.lru import OFTEN, LeastRecentlyUsed, Sightings


def test_the_second_time_while_there_is_room() -> None:
    seen: Sightings[str] = Sightings(4)
    assert [seen.pays("a", has_room=True) for _ in range(3)] == [False, True, False]
    assert [seen.pays("b", has_room=False) for _ in range(OFTEN)] == [False] * (OFTEN - 1) + [True]


def test_what_is_forgotten_begins_anew() -> None:
    seen: Sightings[int] = Sightings(2)
    for key in (1, 2, 3):
        seen.pays(key, has_room=True)
    assert not seen.pays(1, has_room=True) and seen.pays(3, has_room=True)
    seen.clear()
    assert not seen.pays(1, has_room=True)


def test_more_keys_than_places_are_not_made_again_and_again() -> None:
    """At most one in `OFTEN` of those that come costs another one its place."""
    for keys in (16, 24, 40, 100):
        draw = random.Random(0)
        kept: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(16)
        seen: Sightings[int] = Sightings(256)
        made = hits = 0
        for _ in range(2000):
            key = draw.randrange(keys)
            if kept.get(key) is not None:
                hits += 1
            elif seen.pays(key, has_room=kept.has_room):
                made += 1
                kept.keep(key, key)
        assert made <= 16 + 2000 / OFTEN
        assert hits > 0.8 * 2000 * min(1, 16 / keys) - 40
