"""What is hard to keep when computation is left out: details, and questions late in a conversation.

Both are made of the questions that the model was trained on, one by one (`questions.py`); it never
saw two of them in one prompt.
"""

from collections.abc import Sequence

import numpy as np

from fastskip.demo.scenes.questions import NUMBERS, Question, QuestionKind, ask
from fastskip.demo.scenes.world import MAX_FIGURES, Figure, Scene

SMALL = 4.8
"""Pixels: radii lie between 4.5 and 6.5, evenly."""
DETAIL_KINDS = (
    QuestionKind.COLOUR,
    QuestionKind.SHAPE,
    QuestionKind.COUNT,
    QuestionKind.RELATION,
    QuestionKind.LOCATION,
)
TRIES = 32
"""Questions that are drawn before a kind is given up for a scene."""


def is_detailed(scene: Scene) -> bool:
    """Whether it is full, and its smallest figure is small."""
    return len(scene.figures) == MAX_FIGURES and smallest(scene).radius < SMALL


def smallest(scene: Scene) -> Figure:
    """The figure of the least radius."""
    return min(scene.figures, key=lambda figure: figure.radius)


def ask_detail(scene: Scene, kind: QuestionKind, seed: int) -> Question | None:
    """A question about the smallest figure, or how many there are where it is two or more.

    `None` where a scene has none of this kind; kinds are those of `DETAIL_KINDS`.
    """
    rng = np.random.default_rng([seed, scene.noise_seed, DETAIL_KINDS.index(kind)])
    for _ in range(TRIES):
        question = ask(scene, kind, rng)
        if question is not None and _is_detail(question, smallest(scene)):
            return question
    return None


def converse(
    scene: Scene, seed: int, kinds: Sequence[QuestionKind], turns: int = 2
) -> tuple[Question, ...]:
    """So many questions of different kinds on one scene (fewer, where it allows fewer)."""
    rng = np.random.default_rng([seed, scene.noise_seed, turns])
    asked = (ask(scene, kinds[number], rng) for number in rng.permutation(len(kinds)))
    return tuple(question for question in asked if question is not None)[:turns]


def _is_detail(question: Question, figure: Figure) -> bool:
    return {
        QuestionKind.COLOUR: question.text == f"what colour is the {figure.shape}?",
        QuestionKind.SHAPE: question.text == f"what shape is the {figure.colour} object?",
        QuestionKind.COUNT: question.answer in NUMBERS[2:],
        QuestionKind.RELATION: figure.name in question.text,
        QuestionKind.LOCATION: figure.name in question.text,
    }[question.kind]
