"""Splits a configuration into blocks (kernel arguments) and options (for the compiler)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def split(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The upper-case names (constexpr arguments), and the rest (``num_warps`` ..)."""
    blocks = {name: value for name, value in config.items() if name.isupper()}
    return blocks, {name: value for name, value in config.items() if name not in blocks}
