"""The conditions under which a result was measured, as recorded in its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.study.report.fields import Field


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Whatever a result file records of them; only the model's name is required."""

    told: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The checkpoint's name or folder."""
        return str(self.told.get("model", ""))

    @property
    def model_name(self) -> str:
        """The model's name on the page: its hub name, or the last two parts of its path."""
        return "/".join(Path(self.model).parts[-2:]) or "an unnamed model"

    @property
    def model_fingerprint(self) -> str:
        """The fingerprint of the weights; empty if the file has none."""
        return str(self.told.get("model_fingerprint") or "")

    def is_same_model(self, other: Circumstances) -> bool:
        """Compares fingerprints if both have one, else names."""
        mine, theirs = self.model_fingerprint, other.model_fingerprint
        return mine == theirs if mine and theirs else self.model == other.model

    def lines(self) -> Iterator[tuple[str, str]]:
        """Names and values, with nested ones flattened and nulls omitted."""
        yield from _lines("", {**self.told, "model": self.model_name})


def read_circumstances(document: Field) -> Circumstances:
    """The circumstances of a result file."""
    found = document.get("circumstances")
    found.get("model").text()
    return Circumstances(found.object())


def _lines(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _lines("" if name == "versions" else f"{name}: ", value)
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value))
        elif value is not None:
            yield label, str(value)
