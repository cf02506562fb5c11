"""What can be asked about a scene, and the right answers.

Every question has one right answer, which only the image gives away: yes and no are equally likely,
and the other answers are drawn as evenly as the scene allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np

from fastskip.demo.scenes.world import COLOURS, SHAPES, Figure, Scene

Choice = TypeVar("Choice")

NUMBERS = ("zero", "one", "two", "three", "four", "five")
DIRECTIONS = ("left of", "right of", "above", "below")
CAPTION_PROMPT = "describe the image."


class QuestionKind(Enum):
    COLOUR = "colour"
    """what colour is the circle? red (asked where only one figure is a circle)"""
    SHAPE = "shape"
    """what shape is the red object? circle (asked where only one figure is red)"""
    COUNT = "count"
    """how many circles / red objects / objects are there? two"""
    EXISTENCE = "existence"
    """is there a red circle / a circle / a red object? yes"""
    RELATION = "relation"
    """is the red circle left of / right of / above / below the blue square? no"""
    LOCATION = "location"
    """where is the red circle? row two column three"""
    CAPTION = "caption"
    """describe the image. a red circle and a blue square (in reading order)"""


@dataclass(frozen=True, slots=True)
class Question:
    kind: QuestionKind
    text: str
    answer: str


def caption(scene: Scene) -> str:
    """The figures in reading order: "a red circle and a blue square"."""
    return " and ".join(f"a {figure.name}" for figure in scene.figures)


def questions(
    scene: Scene, seed: int, kinds: Sequence[QuestionKind] = tuple(QuestionKind)
) -> list[Question]:
    """One question of each of `kinds` that the scene allows (see `ask`), in that order."""
    rng = np.random.default_rng([seed, scene.noise_seed])
    asked = (ask(scene, kind, rng) for kind in kinds)
    return [question for question in asked if question is not None]


def ask(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> Question | None:
    """A question of this kind, or None if the scene allows none (e.g. no shape is unique)."""
    found = _ASKERS[kind](scene, rng)
    return None if found is None else Question(kind, *found)


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    shapes = [figure.shape for figure in scene.figures]
    figure = _pick([f for f in scene.figures if shapes.count(f.shape) == 1], rng)
    return None if figure is None else (f"what colour is the {figure.shape}?", figure.colour)


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    colours = [figure.colour for figure in scene.figures]
    figure = _pick([f for f in scene.figures if colours.count(f.colour) == 1], rng)
    return None if figure is None else (f"what shape is the {figure.colour} object?", figure.shape)


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    counts = {f"{shape}s": sum(f.shape == shape for f in scene.figures) for shape in SHAPES}
    counts["crosses"] = counts.pop("crosss")
    for colour in COLOURS:
        counts[f"{colour} objects"] = sum(f.colour == colour for f in scene.figures)
    counts["objects"] = len(scene.figures)
    # draw the number, then what has it: otherwise most answers would be zero or one
    number = _pick(sorted(set(counts.values())), rng)
    subject = _pick([subject for subject, n in counts.items() if n == number], rng)
    assert number is not None
    return f"how many {subject} are there?", NUMBERS[number]


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    present = [(f.colour, f.shape) for f in scene.figures]
    colours, shapes = {colour for colour, _ in present}, {shape for _, shape in present}
    wanted, form = rng.random() < 0.5, rng.random()
    subjects: list[str] = []
    if form < 0.25:
        subjects = [shape for shape in SHAPES if (shape in shapes) == wanted]
    elif form < 0.5:
        subjects = [f"{colour} object" for colour in COLOURS if (colour in colours) == wanted]
    elif form < 0.75 and not wanted:
        # the hard ones: colour and shape both occur, but not on one figure
        subjects = [
            f"{c} {s}"
            for c in COLOURS
            for s in SHAPES
            if c in colours and s in shapes and (c, s) not in present
        ]
    if not subjects:
        subjects = [f"{c} {s}" for c in COLOURS for s in SHAPES if ((c, s) in present) == wanted]
    return f"is there a {_pick(subjects, rng)}?", "yes" if wanted else "no"


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    direction = DIRECTIONS[int(rng.integers(len(DIRECTIONS)))]
    wanted = rng.random() < 0.5
    subjects = [
        (a, b)
        for a in scene.figures
        for b in scene.figures
        if related(a, direction, b) and not related(b, direction, a)
    ]
    pair = _pick(subjects, rng)
    if pair is None:
        return None
    subject, other = pair if wanted else reversed(pair)
    text = f"is the {subject.name} {direction} the {other.name}?"
    return text, "yes" if wanted else "no"


def related(subject: Figure, direction: str, other: Figure) -> bool:
    """Whether `subject` lies in `direction` of `other`; cells decide, jitter cannot."""
    return {
        "left of": subject.column < other.column,
        "right of": subject.column > other.column,
        "above": subject.row < other.row,
        "below": subject.row > other.row,
    }[direction]


def _location(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    figure = _pick(scene.figures, rng)
    assert figure is not None
    place = f"row {NUMBERS[figure.row + 1]} column {NUMBERS[figure.column + 1]}"
    return f"where is the {figure.name}?", place


def _caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    return CAPTION_PROMPT, caption(scene)


def _pick(choices: Sequence[Choice], rng: np.random.Generator) -> Choice | None:
    return choices[int(rng.integers(len(choices)))] if choices else None


_ASKERS = {
    QuestionKind.COLOUR: _colour,
    QuestionKind.SHAPE: _shape,
    QuestionKind.COUNT: _count,
    QuestionKind.EXISTENCE: _existence,
    QuestionKind.RELATION: _relation,
    QuestionKind.LOCATION: _location,
    QuestionKind.CAPTION: _caption,
}
