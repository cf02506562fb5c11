"""Sizes of blocks: a configuration's (kernel arguments) apart from its options (for the compiler),
and what a head takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton


def columns_of(head_dim: int) -> int:
    """A block's columns for heads of this size: a product sums over 16 at least."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def split(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The upper-case names (constexpr arguments), and the rest (``num_warps`` ..)."""
    blocks = {name: value for name, value in config.items() if name.isupper()}
    return blocks, {name: value for name, value in config.items() if name not in blocks}
