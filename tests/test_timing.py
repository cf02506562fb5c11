"""What times are taken with."""

from collections import Counter

import pytest

from fastskip.timing import rotated, with_stack_room


@pytest.mark.parametrize("count", range(1, 30))
def test_rounds_start_evenly_spread_whenever_they_end(count: int) -> None:
    """Many rounds for few contenders, few rounds for many, and every number between."""
    starts: list[int] = []
    half = (count + 1) // 2
    for number in range(2 * count + 5):
        order = rotated(range(count), number)
        starts.append(order[0])
        assert order == [*range(order[0], count), *range(order[0])]
        # no contender, and no half of them, is first much more often than its share
        share = len(starts) / count
        assert all(abs(Counter(starts)[n] - share) < 2 for n in range(count))
        assert abs(sum(first < half for first in starts) - share * half) < 2
    assert starts[0] == 0


def test_rounds_of_nothing() -> None:
    assert rotated([], 3) == []


def test_room_on_the_stack_changes_nothing_but_the_stack() -> None:
    deep = [0]

    def go_deeper(most: int) -> int:
        deep[0] += 1
        return most if deep[0] == most else go_deeper(most)

    assert with_stack_room(lambda: go_deeper(400)) == 400
    # More than the pieces of 16 KB that CPython takes; slots are pointers.
    assert with_stack_room.__code__.co_stacksize * 8 > 400 * 1024
