"""Log-likelihoods of continuations, from one forward over contexts with their continuations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from fastskip.families import placeholders
from fastskip.integrations.lmms_eval.inputs import model_inputs, prompt_of
from fastskip.integrations.lmms_eval.messages import RequestError, conversation_of
from fastskip.integrations.lmms_eval.requests import Question, filled, named
from fastskip.policy import TokenClass
from fastskip.tokens import CODES


@dataclass(frozen=True, slots=True)
class Continuation:
    """A question and a candidate continuation."""

    question: Question
    text: str

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of its question."""
        return self.question.images


def continuations(requests: Sequence[Any], documents: Mapping[str, Any]) -> Iterator[Continuation]:
    """The requests of `loglikelihood` as continuations, longest contexts first.

    Args:
        requests: with `args` context, continuation (or a function of the document),
            `doc_to_visual`, document index, task, split.
        documents: the documents of each task, by split.
    Raises:
        RequestError: a request cannot be used.
    """
    for place, request in sorted(enumerate(requests), key=lambda each: -len(each[1].args[0])):
        if len(request.args) != 6:
            raise RequestError(
                f"loglikelihood: {len(request.args)} arguments; allowed: 6 (context, continuation, "
                "doc_to_visual, doc, task, split)"
            )
        context, target, visual, number, task, split = request.args
        try:
            document = documents[task][split][number]
            text = target if isinstance(target, str) else str(target(document))
            pictures = (visual(document) if visual else None) or ()
            content = [{"type": "image", "url": each} for each in pictures]
            said = conversation_of([{"role": "user", "content": [*content, context]}])
        # a task is its author's code and can fail in any way; name the document
        except Exception as error:
            raise RequestError(f"task {task!r}, doc {number}: {error}") from error
        yield Continuation(Question(place, task, number, said), text)


def score_all(
    model: Any, processor: Any, asked: Iterator[Continuation], size: int
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Each request's index, with the sum of log-probabilities and whether the text is the greedy
    continuation.

    Raises:
        RequestError: a request cannot be answered.
    """
    for batch in filled(asked, size):
        scores = score(model, processor, batch)
        for each, found in zip(batch, scores, strict=True):
            yield each.question.place, found


@torch.inference_mode()
def score(model: Any, processor: Any, batch: Sequence[Continuation]) -> list[tuple[float, bool]]:
    """For each text, the sum of log-probabilities and whether it is the greedy continuation.

    The policy treats the texts' rows as GENERATED, as if the model had written them.

    Raises:
        RequestError: a request cannot be answered.
    """
    questions = [each.question for each in batch]
    lengths, whole = [], []
    for each in batch:
        prompt = prompt_of(processor, each.question)
        whole.append(prompt + each.text)
        lengths.append(_token_count(processor, whole[-1]) - _token_count(processor, prompt))
        if lengths[-1] < 1:
            where = named([each.question])
            raise RequestError(f"{where}: continuation {each.text!r}; allowed: at least one token")
    inputs = model_inputs(model, processor, questions, whole)
    ids, longest = inputs["input_ids"], max(lengths)
    try:
        logits = model(
            **inputs,
            token_classes=_classes(ids.cpu(), lengths, model.config),
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits
    except Exception as error:
        raise RequestError(f"{named(questions)}: {error}") from error
    log_probs = F.log_softmax(logits[:, :-1].float(), dim=-1)
    targets = ids[:, -longest:]
    chosen = log_probs.gather(-1, targets[..., None])[..., 0].cpu()
    best = (log_probs.argmax(-1) == targets).cpu()
    return [
        (float(row[-n:].double().sum()), bool(greedy[-n:].all()))
        for row, greedy, n in zip(chosen, best, lengths, strict=True)
    ]


def _token_count(processor: Any, text: str) -> int:
    """The number of tokens of a text, counting each image placeholder as one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return len(tokenizer(text)["input_ids"])


def _classes(ids: Tensor, lengths: Sequence[int], config: Any) -> Tensor:
    """The class of every column, `[B, T]`; arbitrary for padding."""
    codes = torch.full_like(ids, CODES[TokenClass.TEXT])
    codes[placeholders(config, ids)] = CODES[TokenClass.IMAGE]
    for row, length in zip(codes, lengths, strict=True):
        row[-length:] = CODES[TokenClass.GENERATED]
    return codes
