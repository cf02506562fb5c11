"""The quick interpreter finds what the ordinary one does, in shapes that it knows too."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled")


@triton.jit
def _add(result_ptr, SIZE: tl.constexpr, OTHER: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((SIZE,), tl.int32) + tl.full((OTHER,), 2, tl.int32)
    tl.store(result_ptr + tl.arange(0, SIZE), total)


def add(size: Any, other: Any) -> list[int]:
    result = torch.zeros(8, dtype=torch.int32)
    _add[(1,)](result, SIZE=size, OTHER=other)
    found: list[int] = result.tolist()
    return found


def test_shapes_are_checked_each_time() -> None:
    from triton.runtime.errors import InterpreterError

    assert add(4, 4) == [2] * 4 + [0] * 4
    assert add(8, 1) == add(8, 8) == [2] * 8
    for size, other, words in (
        (4, 8, "incompatible dimensions"),
        (4, 3, "power of 2"),
        (4, 4.0, "must have type"),
    ):
        with pytest.raises(InterpreterError, match=words):
            add(size, other)


def test_a_kernel_leaves_the_language_as_it_was() -> None:
    add(4, 4)
    assert tl.core.is_builtin(tl.load)
    assert tl.core.is_builtin(tl.tensor.__add__)
    assert not hasattr(tl.tensor, "__index__")
