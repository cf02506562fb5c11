"""A scene: one to five figures on a 4 x 4 grid, no two of the same colour and shape.

No two figures share both colour and shape, so that questions about "the red circle" are
unambiguous. A hash of a scene's figures, without jitter and noise, decides its split, so that
training never sees an arrangement of the test split.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice

import numpy as np

GRID = 4
MAX_FIGURES = 5
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")


class Split(Enum):
    """The splits share no arrangement of figures: 90, 5 and 5 % of all arrangements."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Figure:
    """One coloured shape in one cell of the grid; `row` 0 is the top, `column` 0 the left."""

    colour: str
    shape: str
    row: int
    column: int
    shift_x: float = 0.0
    """Distance of the centre from the middle of the cell, in pixels; `shift_y` likewise."""
    shift_y: float = 0.0
    radius: float = 5.5

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Figures in reading order, and the look of the background."""

    figures: tuple[Figure, ...]
    background: int = 24
    noise_seed: int = 0

    @property
    def key(self) -> str:
        """The arrangement, without jitter and noise: equal keys mean the same scene."""
        return "; ".join(f"{f.name} {f.row} {f.column}" for f in self.figures)


def split_of(scene: Scene) -> Split:
    digest = hashlib.blake2b(scene.key.encode(), digest_size=8).digest()
    percentile = int.from_bytes(digest, "big") % 100
    if percentile < 90:
        return Split.TRAIN
    return Split.VALIDATION if percentile < 95 else Split.TEST


def scenes(split: Split, count: int, seed: int) -> list[Scene]:
    """`count` different scenes of one split; the same arguments give the same scenes."""
    return list(islice(endless_scenes(split, seed), count))


def endless_scenes(split: Split, seed: int) -> Iterator[Scene]:
    """Different scenes of one split, drawn on demand."""
    rng = np.random.default_rng([seed, list(Split).index(split)])
    seen: set[str] = set()
    while True:
        scene = sample(rng)
        if split_of(scene) is split and scene.key not in seen:
            seen.add(scene.key)
            yield scene


def sample(rng: np.random.Generator, figures: int | None = None) -> Scene:
    """A random scene, with this number of figures if given.

    Small palettes are as likely as large ones, so that counts above one occur.
    """
    count = int(rng.integers(1, MAX_FIGURES + 1)) if figures is None else figures
    colours, shapes = _palette(rng, count)
    kinds = rng.permutation(len(colours) * len(shapes))[:count]
    cells = np.sort(rng.permutation(GRID * GRID)[:count])
    jitter = rng.random((count, 3))
    placed = []
    for kind, cell, (x, y, size) in zip(kinds.tolist(), cells.tolist(), jitter, strict=True):
        radius = 4.5 + 2.0 * size
        slack = 7.5 - radius  # half a pixel stays free, so that neighbours never touch
        placed.append(
            Figure(
                colour=COLOURS[colours[kind // len(shapes)]],
                shape=SHAPES[shapes[kind % len(shapes)]],
                row=cell // GRID,
                column=cell % GRID,
                shift_x=float((2 * x - 1) * slack),
                shift_y=float((2 * y - 1) * slack),
                radius=float(radius),
            )
        )
    background, noise_seed = rng.integers(0, (48, 2**31)).tolist()
    return Scene(tuple(placed), background, noise_seed)


def _palette(rng: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
    """Indices of the colours and of the shapes that a scene of `count` figures may use."""
    while True:
        n_colours, n_shapes = rng.integers(1, (len(COLOURS) + 1, len(SHAPES) + 1)).tolist()
        if n_colours * n_shapes >= count:
            break
    return (
        rng.permutation(len(COLOURS))[:n_colours].tolist(),
        rng.permutation(len(SHAPES))[:n_shapes].tolist(),
    )
