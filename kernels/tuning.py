"""Tuning tables: which block sizes, warps and stages a kernel uses, by GPU, rows and shape.

A table is a folder of ``tables/``: ``gpu.json`` (``name`` as the driver reports it, ``arch`` as 10
* major + minor, ``measured``: what it was measured with, or null) and one ``<kernel>.json`` per
kernel, a list of ``{"rows": .., "shape": [..] or null, "config": {..}}``. ``rows`` is the largest
row count of the bucket, null for any; ``shape`` is defined in the kernel's own file.

Lookup order: tables of this very GPU or of its architecture, measured ones before unmeasured ones
and otherwise this GPU's own first; then ``default``, with conservative sizes for every kernel.
Within a table an entry for this very shape precedes one without a shape; of several, the smallest
bucket that holds the rows is taken. A table without a fitting entry defers to the next. Nothing is
ever tuned at run time; ``python -m benchmarks.gpu tune`` writes tables.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tables"
DEFAULT = "default"

_chosen: ContextVar[Table | None] = ContextVar("chosen", default=None)


@dataclass(frozen=True, slots=True)
class Entry:
    """One bucket of one kernel; ``None`` matches anything."""

    rows: int | None
    shape: tuple[int, ...] | None
    config: Mapping[str, Any]

    def fits(self, rows: int, shape: tuple[int, ...]) -> bool:
        return (self.rows is None or rows <= self.rows) and self.shape in (None, shape)


@dataclass(frozen=True, slots=True)
class Table:
    """The entries of one GPU, by kernel."""

    slug: str
    name: str
    arch: int | None
    measured: Mapping[str, Any] | None
    entries: Mapping[str, Sequence[Entry]]

    def find(self, kernel: str, rows: int, shape: tuple[int, ...]) -> Mapping[str, Any] | None:
        fitting = [entry for entry in self.entries.get(kernel, ()) if entry.fits(rows, shape)]
        best = min(
            fitting,
            key=lambda entry: (entry.shape is None, entry.rows is None, entry.rows or 0),
            default=None,
        )
        return None if best is None else best.config


@functools.cache
def read_table(slug: str) -> Table:
    """The table in folder ``slug``."""
    folder = FOLDER / slug
    about = json.loads((folder / "gpu.json").read_text())
    entries = {}
    for file in sorted(folder.glob("*.json")):
        if file.name != "gpu.json":
            entries[file.stem] = [
                Entry(
                    item["rows"],
                    None if item["shape"] is None else tuple(item["shape"]),
                    item["config"],
                )
                for item in json.loads(file.read_text())
            ]
    return Table(slug, about["name"], about["arch"], about["measured"], entries)


def slugs() -> list[str]:
    """The names of all tables."""
    return sorted(path.parent.name for path in FOLDER.glob("*/gpu.json"))


@functools.cache
def tables_for(name: str | None, arch: int | None) -> tuple[Table, ...]:
    """The tables to look up, in order, on a GPU of this name and architecture."""
    known = [read_table(slug) for slug in slugs()]
    own = [table for table in known if name is not None and table.name == name]
    alike = [
        table for table in known if arch is not None and table.arch == arch and table not in own
    ]
    # Sizes measured on a sibling of this GPU are better than unmeasured ones for the GPU itself.
    found = sorted((*own, *alike), key=lambda table: table.measured is None)
    return (*found, read_table(DEFAULT))


def config_for(
    kernel: str, device: torch.device, rows: int, shape: tuple[int, ...] = ()
) -> Mapping[str, Any]:
    """The configuration of ``kernel`` for ``rows`` rows of ``shape`` on this device."""
    for table in _tables_of(device):
        found = table.find(kernel, rows, shape)
        if found is not None:
            return found
    raise LookupError(f"tables/{DEFAULT}/{kernel}.json has no entry for {rows} rows of {shape}")


def config_over(
    kernel: str, over: str | None, device: torch.device, rows: int, shape: tuple[int, ...] = ()
) -> Mapping[str, Any]:
    """``config_for``, overridden by what the table ``over`` says of these rows."""
    own = config_for(kernel, device, rows, shape)
    return own if over is None else {**own, **config_for(over, device, rows, shape)}


@contextmanager
def table(chosen: str | Table) -> Iterator[None]:
    """Within this block this table, or the one of this name, comes first, whatever the device."""
    if isinstance(chosen, str):
        if chosen not in slugs():
            raise ValueError(f"table: {chosen!r} is unknown; allowed: {', '.join(slugs())}")
        chosen = read_table(chosen)
    token = _chosen.set(chosen)
    try:
        yield
    finally:
        _chosen.reset(token)


def _tables_of(device: torch.device) -> tuple[Table, ...]:
    chosen = _chosen.get()
    if chosen is not None:
        alike = (one for one in tables_for(chosen.name, chosen.arch) if one != chosen)
        return (chosen, *alike)
    if device.type != "cuda":
        return tables_for(None, None)
    return _tables_on(device.index or 0)


@functools.cache
def _tables_on(index: int) -> tuple[Table, ...]:
    major, minor = torch.cuda.get_device_capability(index)
    return tables_for(torch.cuda.get_device_name(index), 10 * major + minor)
