"""Scenes and questions as training batches.

Many questions share the image of one sequence: the image is computed once, and each question sees
the image and itself, but no other question. Each question's positions start right after the image,
so training sees exactly what a prompt with one question looks like. A share of the sequences is
packed as one conversation instead (plain causal mask), so that later turns are learned too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastskip.demo.scenes import Question, QuestionKind, Scene, ask, render
from fastskip.demo.text import ASSISTANT, IMAGE_MEAN, IMAGE_STD, IMAGE_TOKENS, USER

IMAGE_COLUMNS = slice(2, 2 + IMAGE_TOKENS)
"""Columns of the image in every sequence: after the bos token and "USER:"."""
IGNORED = -100
"""The label of a token that adds no loss."""


@dataclass(frozen=True)
class Batch:
    pixels: Tensor
    """[B, 3, 64, 64], normalised."""
    ids: Tensor
    """[B, T]"""
    labels: Tensor
    """[B, T], already shifted: the next token in answers, else `IGNORED`."""
    positions: Tensor
    """[B, T]"""
    visible: Tensor
    """[B, 1, T, T]: whether the query (row) sees the key (column)."""
    questions: Tensor
    """[B, T]: number of the token's question; 0 for the image, -1 for padding."""
    kinds: tuple[tuple[QuestionKind, ...], ...]
    """Of each sequence, the kinds of its questions 1, 2, ..."""


@dataclass(frozen=True)
class Mixture:
    """What training asks, and how it is packed."""

    weights: Mapping[QuestionKind, float]
    length: int = 256
    """Tokens per sequence, image included."""
    conversations: float = 0.15
    """Share of the sequences that are one conversation."""


class Packer:
    """Turns scenes into batches; caches the tokens of texts seen so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mixture: Mixture) -> None:
        self.mixture = mixture
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._kinds = list(mixture.weights)
        share = np.array([mixture.weights[kind] for kind in self._kinds])
        self._shares = share / share.sum()

    def pack(self, scenes: Sequence[Scene], rng: np.random.Generator) -> Batch:
        count, length = len(scenes), self.mixture.length
        ids = np.full((count, length), self._tokenizer.pad_token_id)
        labels = np.full((count, length), IGNORED)
        positions = np.zeros((count, length), np.int64)
        numbers = np.full((count, length), -1)
        talks = rng.random(count) < self.mixture.conversations
        kinds = []
        for row, (scene, talk) in enumerate(zip(scenes, talks, strict=True)):
            kinds.append(
                self._fill(scene, rng, talk, ids[row], labels[row], positions[row], numbers[row])
            )
        # in a conversation, every token belongs to the shared group 0
        groups = np.where(talks[:, None], np.minimum(numbers, 0), numbers)
        return Batch(
            normalise(torch.from_numpy(render(scenes))),
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            visibility(torch.from_numpy(groups)),
            torch.from_numpy(numbers),
            tuple(kinds),
        )

    def _fill(
        self,
        scene: Scene,
        rng: np.random.Generator,
        talk: bool,
        ids: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
        numbers: np.ndarray,
    ) -> tuple[QuestionKind, ...]:
        """Write one sequence and return the kinds of its questions."""
        start = self._tokens(USER) + self._tokens("<image>") * IMAGE_TOKENS
        end = 1 + len(start)
        ids[0], ids[1:end] = self._tokenizer.bos_token_id, start
        positions[:end], numbers[:end] = np.arange(end), 0
        image_end, kinds = end, []
        for number in range(1, len(ids)):
            question = self._question(scene, rng)
            prompt = self._tokens(question.text) + self._tokens(ASSISTANT)
            if talk and number > 1:
                prompt = self._tokens(USER) + prompt
            answer = [*self._tokens(question.answer), self._tokenizer.eos_token_id]
            stop = end + len(prompt) + len(answer)
            if stop > len(ids):
                break
            ids[end:stop] = prompt + answer
            labels[end + len(prompt) - 1 : stop - 1] = answer
            first = end if talk else image_end
            positions[end:stop] = np.arange(first, first + stop - end)
            numbers[end:stop] = number
            kinds.append(question.kind)
            end = stop
        return tuple(kinds)

    def _question(self, scene: Scene, rng: np.random.Generator) -> Question:
        while True:
            kind = self._kinds[int(rng.choice(len(self._kinds), p=self._shares))]
            question = ask(scene, kind, rng)
            if question is not None:
                return question

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


def normalise(pixels: Tensor) -> Tensor:
    """[B, 64, 64, 3] bytes -> [B, 3, 64, 64] floats, as the image processor makes them."""
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def visibility(groups: Tensor) -> Tensor:
    """[B, T] -> [B, 1, T, T]: a token sees group 0 and its own, causally; pads see only pads."""
    queries, keys = groups[:, :, None], groups[:, None, :]
    causal = torch.ones(groups.shape[1], groups.shape[1], dtype=torch.bool).tril()
    return (causal & ((keys == queries) | ((keys == 0) & (queries >= 0))))[:, None]
