"""Sizes that graphs are made for: rounded up, so that a few graphs serve all calls."""

from __future__ import annotations


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``, which is not 0."""
    return 1 << (count - 1).bit_length()


def rounded_rows(count: int) -> int:
    """How many rows a group of ``count`` is padded to: up to a sixteenth or 15 rows more."""
    step = max(16, power_of_two(count) // 32) if count else 1
    return -(-count // step) * step
