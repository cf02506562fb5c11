"""Scenes of coloured shapes: their content, their pixels, and questions about them."""

from fastskip.demo.scenes.drawing import IMAGE_SIZE, draw, render
from fastskip.demo.scenes.harder import DETAIL_KINDS, ask_detail, converse, is_detailed
from fastskip.demo.scenes.questions import Question, QuestionKind, ask, caption, questions
from fastskip.demo.scenes.world import (
    COLOURS,
    GRID,
    SHAPES,
    Figure,
    Scene,
    Split,
    scenes,
    split_of,
)

__all__ = [
    "COLOURS",
    "DETAIL_KINDS",
    "GRID",
    "IMAGE_SIZE",
    "SHAPES",
    "Figure",
    "Question",
    "QuestionKind",
    "Scene",
    "Split",
    "ask",
    "ask_detail",
    "caption",
    "converse",
    "draw",
    "is_detailed",
    "questions",
    "render",
    "scenes",
    "split_of",
]
