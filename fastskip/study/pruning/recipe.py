"""What to prune, by which score, and how much: pruning's vocabulary, validated once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from fastskip.policy import PolicyError, Sublayer, select_layers
from fastskip.policy.fields import Layers, layer_selection
from fastskip.sparse.matrices import Matrix, SparseError

E = TypeVar("E", bound=StrEnum)
_PATTERNS = 'N:M with 0 < N < M, such as "2:4" or "4:8"'


class PruningError(SparseError):
    """A pruning request that cannot be met; names the field, its value and what is allowed."""


class Method(StrEnum):
    """The score that decides which weights are kept.

    WANDA: |weight| times the norm of its input over calibration samples (Sun et al. 2023, arXiv
    2306.11695). MAGNITUDE: |weight|. RANDOM: a seeded draw.
    """

    WANDA = "wanda"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Part(StrEnum):
    """Which projections of a layer are pruned: all, attention's or the FFN's."""

    BLOCK = "block"
    ATTENTION = "attention"
    FFN = "ffn"

    @property
    def sublayers(self) -> frozenset[Sublayer]:
        return frozenset(Sublayer) if self is Part.BLOCK else frozenset({Sublayer(self.value)})


class Per(StrEnum):
    """The group in which weights compete: each output row, or the whole matrix."""

    ROW = "row"
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class Pattern:
    """N:M sparsity: of every ``group`` neighbours in a row, ``kept`` are kept. Written ``2:4``."""

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group:
            raise PruningError("pattern", repr(str(self)), _PATTERNS)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None:
            raise PruningError("pattern", repr(text), _PATTERNS)
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def ratio(self) -> float:
        """The share of weights that it removes."""
        return 1 - self.kept / self.group


@dataclass(frozen=True, slots=True, init=False)
class Recipe:
    """How to prune. Accepts strings and holds typed values.

    Attributes:
        method: the score.
        ratio: the share of weights to remove, in (0, 1); with a pattern, the pattern's.
        pattern: N:M sparsity; ``None`` for unstructured pruning.
        per: the group in which weights compete; by default a row for Wanda, as in its paper, else
            the matrix. Not to be given with a pattern, whose own groups compete.
        part, layers: which projections; layers as in a policy (``"4:20"``, ``[1, 2]``).
        seed: of random draws.
    """

    method: Method
    ratio: float
    pattern: Pattern | None
    per: Per
    part: Part
    layers: Layers
    seed: int

    def __init__(
        self,
        method: Method | str = Method.WANDA,
        ratio: float | None = None,
        *,
        pattern: Pattern | str | None = None,
        per: Per | str | None = None,
        part: Part | str = Part.BLOCK,
        layers: str | Sequence[int] = ":",
        seed: int = 0,
    ) -> None:
        chosen = _member(Method, method, "method")
        pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        if pattern is not None and per is not None:
            raise PruningError("per", repr(per), "none with a pattern, whose groups compete")
        if type(seed) is not int:
            raise PruningError("seed", repr(seed), "an integer")
        usual = Per.ROW if chosen is Method.WANDA or pattern is not None else Per.MATRIX
        values = {
            "method": chosen,
            "ratio": _checked_ratio(ratio, pattern),
            "pattern": pattern,
            "per": usual if per is None else _member(Per, per, "per"),
            "part": _member(Part, part, "part"),
            "layers": _checked_layers(layers),
            "seed": seed,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "method": self.method.value,
            "ratio": self.ratio,
            "pattern": None if self.pattern is None else str(self.pattern),
            "per": self.per.value,
            "part": self.part.value,
            "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
            "seed": self.seed,
        }

    def competing(self, rows: int, columns: int) -> int:
        """How many weights compete with each other in a matrix of this shape."""
        if self.pattern is not None:
            return self.pattern.group
        return columns if self.per is Per.ROW else rows * columns

    def removed(self, competing: int) -> int:
        """How many of ``competing`` weights are removed, to the nearest whole number."""
        return round(self.ratio * competing)

    def choose(self, found: Iterable[Matrix]) -> list[Matrix]:
        """The matrices of a model, out of ``found``, that this recipe prunes.

        Raises:
            PruningError: the model has no such layers, the pattern does not divide a matrix, or the
                ratio is too small to remove a single weight.
        """
        every = list(found)
        depth = 1 + max((matrix.layer for matrix in every), default=-1)
        try:
            layers = set(select_layers(self.layers, depth, "layers"))
        except PolicyError as error:
            raise PruningError(error.field, repr(error.value), error.allowed) from error
        chosen = [m for m in every if m.layer in layers and m.sublayer in self.part.sublayers]
        for matrix in chosen:
            columns = matrix.weight.shape[1]
            if self.pattern is not None and columns % self.pattern.group:
                allowed = f"a pattern N:M whose M divides the {columns} columns of {matrix.name}"
                raise PruningError("pattern", self.pattern, allowed)
        most = max((self.competing(*matrix.weight.shape) for matrix in chosen), default=0)
        if chosen and not self.removed(most):
            allowed = f"more than {0.5 / most:.3g}: of {most} competing weights, none would go"
            raise PruningError("ratio", self.ratio, allowed)
        return chosen


def _checked_ratio(ratio: float | None, pattern: Pattern | None) -> float:
    if pattern is not None:
        if ratio is not None and ratio != pattern.ratio:
            raise PruningError("ratio", ratio, f"{pattern.ratio:g}, or none, with {pattern}")
        return pattern.ratio
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not is_number or not 0 < ratio < 1:  # type: ignore[operator]
        raise PruningError("ratio", ratio, "a share in (0, 1), such as 0.5, or a pattern")
    return float(ratio)  # type: ignore[arg-type]


def _checked_layers(layers: str | Sequence[int]) -> Layers:
    try:
        return layer_selection(layers)
    except PolicyError as error:
        raise PruningError(error.field, repr(error.value), error.allowed) from error


def _member(enum: type[E], value: str, field: str) -> E:
    if value not in tuple(enum):
        raise PruningError(field, repr(value), ", ".join(enum))
    return enum(value)
