"""A prepared model behind lmms-eval's model interface: batches, left padding, times per task.

A request that cannot be answered ends the run with the task, the document and the reason; an empty
answer would silently be scored as if the model had given it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

import fastskip
from fastskip.integrations.lmms_eval.inputs import model_inputs, prompt_of
from fastskip.integrations.lmms_eval.likelihood import continuations, score_all
from fastskip.integrations.lmms_eval.messages import RequestError
from fastskip.integrations.lmms_eval.requests import Batch, batches, named
from fastskip.integrations.lmms_eval.times import TaskTimes
from fastskip.prompts import processor_for
from fastskip.study.calls import end_tokens, in_answers
from fastskip.timing import Arrivals

NEW_TOKENS = 1024
"""If neither the task nor the user sets it; the default of lmms-eval's own wrappers."""


class FastSkip(lmms):
    """`--model fastskip`."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        impl: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = NEW_TOKENS,
        threads: int | None = None,
    ) -> None:
        """Loads a checkpoint.

        Args:
            pretrained: a folder or a hub id.
            policy: a policy file or a preset; `None`: the checkpoint's own, else dense.
            dtype: for example "bfloat16"; "auto" is the checkpoint's.
            device: `None`: a GPU if there is one, a different one for each local process.
            impl: the implementation, as in `fastskip.load_model`.
            batch_size: prompts per batch.
            max_new_tokens: the maximum length of an answer if the task does not set it.
            threads: CPU threads; `None` keeps torch's setting.
        Raises:
            ValueError: an argument, the policy or the checkpoint cannot be used.
        """
        super().__init__()
        self.batch_size = _positive("batch_size", batch_size)
        self._new_tokens = _positive("max_new_tokens", max_new_tokens)
        if threads is not None:
            torch.set_num_threads(_positive("threads", threads))
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        # the processor first, to fail before reading weights
        self._processor = processor_for(pretrained)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._model = fastskip.load_model(
            pretrained, policy, dtype=dtype, device=_device(device), impl=impl
        )
        self._ends = end_tokens(self._model)
        logger.info(
            "fastskip {}: {} on {}, {}, batch {}, policy {}",
            fastskip.__version__,
            pretrained,
            self.device,
            self._model.dtype,
            self.batch_size,
            fastskip.plan_of(self._model).policy.to_dict(),
        )

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return torch.device(self._model.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests; the times of every task are logged.

        Raises:
            RequestError: a request cannot be answered; names the task and the document.
        """
        answers: dict[int, GenerationResult] = {}
        times: dict[str, TaskTimes] = {}
        with self._bar(len(requests)) as bar:
            for batch in batches(requests, self.task_dict, self.batch_size):
                told = self._answer(batch, times.setdefault(batch.task, TaskTimes()))
                places = [question.place for question in batch.questions]
                answers.update(zip(places, told, strict=True))
                bar.update(len(told))
        for task, own in times.items():
            self._log(task, own)
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each continuation, the sum of its tokens' log-probabilities and whether it is greedy.

        lmms-eval 0.7 makes no such requests from the YAML tasks of chat models. Its own scoring of
        `multiple_choice` treats the *smallest* number as the best, as for losses; a warning in the
        log says so.

        Raises:
            RequestError: a request cannot be answered; names the task and the document.
        """
        if any(request.idx for request in requests):
            logger.warning(
                "several continuations per document: these are log-probabilities, so the largest "
                "is the best; lmms-eval's own multiple_choice takes the smallest"
            )
        found: dict[int, tuple[float, bool]] = {}
        asked = continuations(requests, self.task_dict)
        with self._bar(len(requests)) as bar:
            scored = score_all(self._model, self._processor, asked, self.batch_size)
            for place, score in scored:
                found[place] = score
                bar.update()
        return [found[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: tasks in which the next question depends on the last answer."""
        raise NotImplementedError(
            "generate_until_multi_round: not supported, since the next question depends on the "
            "last answer; supported: generate_until, whose messages may include earlier turns"
        )

    def _answer(self, batch: Batch, times: TaskTimes) -> list[GenerationResult]:
        """Answers to one batch, whose time is added to the task's."""
        prompts = [prompt_of(self._processor, each) for each in batch.questions]
        inputs = model_inputs(self._model, self._processor, batch.questions, prompts)
        width = inputs["input_ids"].shape[1]
        most = self._room(batch, width)
        arrivals = Arrivals() if batch.options.is_timed else None
        began = time.perf_counter()
        try:
            sequences = self._model.generate(
                **inputs, **batch.options.generate, max_new_tokens=most, streamer=arrivals
            )
            new = sequences[:, width:].cpu()
        except Exception as error:
            raise RequestError(f"{named(batch.questions)}: {error}") from error
        ended = time.perf_counter()
        own = zip(new, in_answers(new, self._ends), strict=True)
        made: list[list[int]] = [tokens[is_own].tolist() for tokens, is_own in own]
        times.add(began, ended, sum(map(len, made)), arrivals.tokens if arrivals else ())
        texts = self._tokenizer.batch_decode(made, skip_special_tokens=True)
        asked: list[int] = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(
                batch.options.cut(text).strip(),
                TokenCounts(input_tokens=before, output_tokens=len(tokens)),
            )
            for text, tokens, before in zip(texts, made, asked, strict=True)
        ]

    def _room(self, batch: Batch, width: int) -> int:
        """The maximum number of new tokens: as requested, but within the model's positions.

        Raises:
            RequestError: the prompts leave no position for a new token.
        """
        positions: int = self._model.config.get_text_config().max_position_embeddings
        wanted, left = batch.options.new_tokens or self._new_tokens, positions - width
        if left < 1:
            where = named(batch.questions)
            raise RequestError(f"{where}: {width} tokens; allowed: at most {positions - 1}")
        return min(wanted, left)

    def _log(self, task: str, times: TaskTimes) -> None:
        """Logs a task's times through the harness.

        The harness keeps means over everything logged under a name, so each task's numbers are also
        logged under names that include the task.
        """
        latencies = times.latencies()
        own = {f"{name}/{task}": seconds for name, seconds in latencies.items()}
        rank = {"rank": self.rank} if self.world_size > 1 else {}
        log_metrics(
            total_elapsed_time=times.seconds,
            total_gen_tokens=times.tokens,
            avg_speed=times.tokens_per_second,
            additional_metrics={"task": task, **latencies, **own, **rank},
        )

    def _bar(self, total: int) -> tqdm[Any]:
        return tqdm(total=total, desc="fastskip", disable=self.rank != 0)


def _positive(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}: {value!r}; allowed: an integer >= 1")
    return number


def _device(name: str | None) -> str:
    """The given device, else a GPU if there is one: a different one for each local process."""
    if name is not None:
        return name
    local = int(os.environ.get("LOCAL_RANK", 0))
    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
