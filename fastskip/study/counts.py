"""The check of counts that callers give."""

from __future__ import annotations


def check_counts(error: type[ValueError], **counts: tuple[int, int]) -> None:
    """Check that counts are large enough; `counts`: the value and its least, by name.

    Raises:
        ValueError: of type `error`: names the first one that is too small.
    """
    for name, (value, least) in counts.items():
        if value < least:
            raise error(f"{name}: {value}; allowed: {least} or more")
