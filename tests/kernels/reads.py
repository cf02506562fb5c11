"""Which memory kernels read, as Triton's interpreter sees it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from fastskip.kernels.numerics import INTERPRETED


@contextmanager
def watched(*tensors: Tensor | None) -> Iterator[list[int]]:
    """Counts the loads of elements of ``tensors`` within this block, each in a place of its own.

    Compiled kernels cannot be watched: nothing is counted then.
    """
    counts = [0] * len(tensors)
    if not INTERPRETED.value:
        yield counts
        return
    from triton.runtime.interpreter import InterpreterBuilder

    known = InterpreterBuilder.create_masked_load

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                begin = tensor.data_ptr()
                end = begin + tensor.numel() * tensor.element_size()
                counts[number] += int(((read >= begin) & (read < end)).sum())
        return known(self, pointers, mask, *rest)

    with patch.object(InterpreterBuilder, "create_masked_load", load):
        yield counts
