"""What times are taken with: a thread of its own changes nothing but the stack."""

import threading
from contextvars import ContextVar

import pytest
import torch

from fastskip.timing import on_shallow_stack, threads_set

COLOUR: ContextVar[str] = ContextVar("colour", default="none")


@pytest.mark.parametrize("count", [1, 2])
def test_work_on_a_shallow_stack_has_the_callers_threads_and_context(count: int) -> None:
    token = COLOUR.set("green")
    try:
        with threads_set(count):
            found = on_shallow_stack(
                lambda: (COLOUR.get(), torch.get_num_threads(), threading.current_thread())
            )
            assert torch.get_num_threads() == count
    finally:
        COLOUR.reset(token)
    assert found[:2] == ("green", count) and found[2] is not threading.current_thread()


def test_what_work_raises_is_raised() -> None:
    def fail() -> None:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        on_shallow_stack(fail)
