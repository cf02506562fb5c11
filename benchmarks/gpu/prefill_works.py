"""The fused operations of a prefill as units of work: all rows of one prompt, or its text rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.inputs import Maker
from benchmarks.gpu.works import (
    Outcome,
    Work,
    WorkMaker,
    add,
    add_down,
    add_output,
    feed,
    lazy,
    of_products,
    project_append,
)


def normalize(make: Maker, rows: int) -> Work:
    h, norm = make.noise(rows, make.widths.hidden), make.norm()
    return Work(
        lambda ops: [ops.normalize(h, norm)],
        2 * h.nbytes,
        rival=lambda: F.rms_norm(h, h.shape[-1:], norm.weight, norm.epsilon),
    )


def attend_rows(make: Maker, rows: int) -> Work:
    return _attend_rows(make, range(rows))


def attend_rows_text(make: Maker, rows: int) -> Work:
    """The text rows' queries over a whole prompt: what remains when image rows are frozen."""
    return _attend_rows(make, make.text_rows())


def feed_text(make: Maker, rows: int) -> Work:
    """The first half of an FFN for the text rows of a prompt of ``rows``."""
    part, h = make.feed(), make.noise(rows, make.widths.hidden)
    index = make.integers(make.text_rows())
    return of_products(
        len(index),
        [part.linear],
        lambda ops: ops.feed(h, [part], index=index),
        rival=lambda: F.linear(h[index], part.linear.weight),
    )


def add_down_text(make: Maker, rows: int) -> Work:
    """The second half of an FFN for the text rows of a prompt of ``rows``."""
    index = make.integers(make.text_rows())
    return add(make, len(index), [make.widths.ffn], rows, index)


def compact(make: Maker, rows: int) -> Work:
    mask = make.noise(rows) > 0

    def run(ops: Any) -> Outcome:
        index, count = ops.compact(mask)
        # Values beyond the count are unspecified.
        inside = torch.arange(rows, device=index.device) < count
        return [torch.where(inside, index, -1), count]

    return Work(run, mask.nbytes + 4 * rows)


PREFILL: dict[str, WorkMaker] = {
    "normalize": normalize,
    "project_append": project_append,
    "attend_rows": attend_rows,
    "attend_rows, text": attend_rows_text,
    "add_output": add_output,
    "feed": feed,
    "add_down": add_down,
    "feed, text": feed_text,
    "add_down, text": add_down_text,
    "compact": compact,
}


def _attend_rows(make: Maker, rows: list[int] | range) -> Work:
    size, pages, reach = make.widths, make.pages(1), make.prompt_reach(rows)
    queries = make.noise(len(rows), size.heads, size.head_dim)
    scale = size.head_dim**-0.5
    pairs, most = sum(row + 1 for row in rows), max(rows) + 1

    def rival() -> Callable[[], object]:
        keys, values = make.noise(2, 1, size.groups, most, size.head_dim)
        columns = torch.arange(most, device=make.device)
        # No mask where torch's fastest path needs none.
        is_whole = len(rows) == most
        mask = None if is_whole else columns < reach.limits[:, None]
        turned = queries.transpose(0, 1)[None]
        return lambda: F.scaled_dot_product_attention(
            turned,
            keys,
            values,
            mask,
            is_causal=is_whole,
            scale=scale,
            enable_gqa=size.heads != size.groups,
        )

    return Work(
        lambda ops: [ops.attend_rows(queries, reach, pages, scale)],
        2 * most * size.groups * size.head_dim * make.dtype.itemsize,
        4 * pairs * size.heads * size.head_dim,
        rival=lazy(rival),
    )
