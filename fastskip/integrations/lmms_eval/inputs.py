"""Turns questions into model inputs; errors name the question that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastskip.integrations.lmms_eval.messages import RequestError
from fastskip.integrations.lmms_eval.requests import Question, named
from fastskip.prompts import PromptError, encode_prompts
from fastskip.prompts.conversations import DataError
from fastskip.prompts.rendering import Renderer
from fastskip.study.calls import placed


def prompt_of(processor: Any, question: Question) -> str:
    """A question's whole prompt, rendered with the checkpoint's chat template.

    Raises:
        RequestError: the template cannot render it.
    """
    said = question.said
    try:
        return Renderer(processor).prompt(
            said.history, said.question, len(said.images), named([question]), said.system
        )
    except DataError as error:
        raise RequestError(str(error)) from error


def model_inputs(
    model: Any, processor: Any, questions: Sequence[Question], prompts: Sequence[str]
) -> dict[str, Any]:
    """Prompts with their questions' images, padded on the left, on the model's device.

    Raises:
        RequestError: a prompt has too many tokens, or its images do not fit.
    """
    images = [each.images for each in questions]
    try:
        inputs = encode_prompts(processor, prompts, images, config=model.config)
    except PromptError as error:
        raise _attributed(model, processor, questions, prompts, error) from error
    return placed(inputs, model)


def _attributed(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    prompts: Sequence[str],
    error: PromptError,
) -> RequestError:
    """The error for the first question that fails on its own, else for the whole batch."""
    for each, prompt in zip(questions, prompts, strict=True):
        try:
            encode_prompts(processor, [prompt], [each.images], config=model.config)
        except PromptError as own:
            return RequestError(f"{named([each])}: {own}")
    return RequestError(f"{named(questions)}: {error}")
