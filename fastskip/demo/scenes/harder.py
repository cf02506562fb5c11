"""What is hard to keep when computation is skipped: details, and later turns of a conversation.

Both use the questions that the model was trained on (`questions.py`).
"""

from collections.abc import Sequence

import numpy as np

from fastskip.demo.scenes.questions import NUMBERS, Question, QuestionKind, ask
from fastskip.demo.scenes.world import MAX_FIGURES, Figure, Scene

SMALL = 4.8
"""Radius in pixels; radii are uniform between 4.5 and 6.5."""
DETAIL_KINDS = (
    QuestionKind.COLOUR,
    QuestionKind.SHAPE,
    QuestionKind.COUNT,
    QuestionKind.RELATION,
    QuestionKind.LOCATION,
)
TRIES = 32
"""Questions to draw before giving up on a kind for a scene."""


def is_detailed(scene: Scene) -> bool:
    """Whether the scene is full and its smallest figure is small."""
    return len(scene.figures) == MAX_FIGURES and smallest(scene).radius < SMALL


def smallest(scene: Scene) -> Figure:
    """The figure with the smallest radius."""
    return min(scene.figures, key=lambda figure: figure.radius)


def ask_detail(scene: Scene, kind: QuestionKind, seed: int) -> Question | None:
    """A question about the smallest figure, or about a count of two or more.

    `kind` is one of `DETAIL_KINDS`; `None` if no such question was found for the scene.
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
    """`turns` questions of different kinds on one scene (fewer if it allows fewer)."""
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
