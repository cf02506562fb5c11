"""The demo's measurements: answers, times and accuracy of every candidate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from fastskip.demo.evaluation import Item, answers, held_out, prompt
from fastskip.demo.policies import Candidate
from fastskip.demo.results import Example, Quality, Score
from fastskip.demo.scenes import QuestionKind, Split, draw, questions, scenes
from fastskip.demo.scenes.questions import CAPTION_PROMPT
from fastskip.loading import load_model, plan_of, set_policy
from fastskip.plan import SkipPlan
from fastskip.plan.single_call import SingleCall
from fastskip.timing import Runs, endless, promising, race, threads_set, time_once

QUESTIONS = tuple(kind for kind in QuestionKind if kind is not QuestionKind.CAPTION)
SEED = 7
Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: at most so many rounds and chunks, as time allows.

    `total_s` covers everything: the chunks get what the speed measurement leaves. Each chunk has
    `questions` questions and `captions` captions. A timed run generates `new_tokens`, the length of
    a caption of five figures.
    """

    examples: int = 6
    rounds: int = 15
    new_tokens: int = 20
    chunks: int = 20
    questions: int = 18
    captions: int = 6
    speed_s: float = 30.0
    total_s: float = 74.0


QUICK = Effort(examples=3, rounds=9, chunks=8, speed_s=8.0, total_s=28.0)


@dataclass(frozen=True, slots=True)
class Bench:
    """The checkpoint under Hugging Face's decoder and under ours, and its processor."""

    hf: Any
    ours: Any
    processor: LlavaProcessor

    @classmethod
    def load(cls, folder: Any, dtype: torch.dtype = torch.float32) -> "Bench":
        hf = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        ours = load_model(folder, "dense", dtype=dtype)
        return cls(hf, ours, AutoProcessor.from_pretrained(folder))

    @property
    def depth(self) -> int:
        depth: int = self.hf.config.text_config.num_hidden_layers
        return depth

    def model(self, candidate: Candidate) -> Any:
        """The model that the candidate runs."""
        return self.hf if candidate.policy is None else set_policy(self.ours, candidate.policy)

    def plans(self, candidates: Sequence[Candidate]) -> dict[str, SkipPlan]:
        """By label; Hugging Face's is the dense one."""
        return {
            each.label: plan_of(set_policy(self.ours, each.policy or "dense"))
            for each in candidates
        }


def examples(bench: Bench, candidates: Sequence[Candidate], count: int) -> tuple[Example, ...]:
    """Questions of different kinds, each about its own picture, answered by each candidate."""
    kinds = [*QuestionKind][::-1]  # the long answers first
    items = []
    for number, scene in enumerate(scenes(Split.TEST, count, SEED)):
        allowed = questions(scene, SEED, kinds[number % len(kinds) :] + kinds)
        items.append((scene, allowed[0]))
    given = {each.label: answers(bench.model(each), bench.processor, items) for each in candidates}
    return tuple(
        Example(scene, question, {label: told[number] for label, told in given.items()})
        for number, (scene, question) in enumerate(items)
    )


def speeds(
    bench: Bench,
    candidates: Sequence[Candidate],
    threads: Sequence[int],
    effort: Effort,
    on_round: Tick,
) -> tuple[SingleCall, Runs]:
    """Times of generating one caption at batch 1, and the rows of its prompt."""
    scene = scenes(Split.TEST, 1, SEED)[0]
    text = prompt(bench.processor, CAPTION_PROMPT)
    inputs = bench.processor(images=[draw(scene)], text=[text], return_tensors="pt")
    is_image = inputs["input_ids"][0] == bench.hf.config.image_token_id
    n_image = int(is_image.sum())
    load = SingleCall(
        n_image, len(is_image) - n_image, int(is_image.int().argmax()), effort.new_tokens
    )
    by_label = {each.label: each for each in candidates}
    with endless(bench.hf), endless(bench.ours):
        runs = race(
            list(by_label),
            lambda label: time_once(bench.model(by_label[label]), inputs, effort.new_tokens),
            threads=promising(threads, lambda: time_once(bench.ours, inputs, effort.new_tokens)),
            rounds=effort.rounds,
            budget_s=effort.speed_s,
            on_round=on_round,
        )
    return load, runs


def qualities(
    bench: Bench,
    candidates: Sequence[Candidate],
    threads: Sequence[int],
    effort: Effort,
    budget_s: float,
    on_chunk: Tick,
) -> dict[str, tuple[Quality, list[str]]]:
    """Each candidate's quality and its answers, over as many chunks of items as time allows.

    All candidates answer a chunk before the next one begins, so they answer the same items. A
    chunk runs on the number of threads that was faster last time.
    """
    asked = held_out(effort.chunks * effort.questions, SEED, QUESTIONS)
    described = held_out(effort.chunks * effort.captions, SEED + 1, (QuestionKind.CAPTION,))
    found: dict[str, tuple[Quality, list[str]]] = {
        each.label: (Quality(), []) for each in candidates
    }
    lasted = dict.fromkeys(threads, 0.0)
    began = time.perf_counter()
    for number in range(effort.chunks):
        entered = time.perf_counter()
        spent = entered - began
        if number and spent * (number + 1) / number > budget_s:
            break
        items = [
            *asked[number * effort.questions :][: effort.questions],
            *described[number * effort.captions :][: effort.captions],
        ]
        count = min(lasted, key=lambda threads: lasted[threads])
        with threads_set(count):
            for candidate in candidates:
                told = answers(bench.model(candidate), bench.processor, items, effort.captions)
                before, all_told = found[candidate.label]
                found[candidate.label] = before + _judge(items, told), all_told + told
        lasted[count] = time.perf_counter() - entered
        on_chunk()
    return found


def _judge(items: Sequence[Item], told: Sequence[str]) -> Quality:
    quality = Quality()
    for (_, question), answer in zip(items, told, strict=True):
        score = Score(int(answer == question.answer), 1)
        is_caption = question.kind is QuestionKind.CAPTION
        quality += Quality(captions=score) if is_caption else Quality(questions=score)
    return quality
