"""What times are taken with."""

from fastskip.timing import with_stack_room


def test_room_on_the_stack_changes_nothing_but_the_stack() -> None:
    deep = [0]

    def go_deeper(most: int) -> int:
        deep[0] += 1
        return most if deep[0] == most else go_deeper(most)

    assert with_stack_room(lambda: go_deeper(400)) == 400
    # More than the pieces of 16 KB that CPython takes; slots are pointers.
    assert with_stack_room.__code__.co_stacksize * 8 > 400 * 1024
