"""Greedy decoding ahead of the host says what Hugging Face's loop says, and wastes little."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import fastskip
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.step_state import StepState
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.device_loop import AHEAD
from fastskip.generation.device_step import DeviceStep, DeviceSteps
from fastskip.policy import TokenClass
from fastskip.tokens import CODES
from tests.agreement import greedy
from tests.batches import Batch, random_batch
from tests.checkpoints import IMAGE_ID
from tests.device.conftest import IMPL
from tests.generating import NEW, Twins, twins
from tests.models import tiny_llava
from tests.policies import MIXED

Options = dict[str, Any]
Make = Callable[[Twins], Options]


@pytest.fixture(scope="module", params=["llava", "llama"])
def models(request: pytest.FixtureRequest) -> Twins:
    return twins(request.param, impl=IMPL)


@pytest.fixture(scope="module")
def llava() -> Twins:
    return twins("llava", impl=IMPL)


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def said(models: Twins, row: int, step: int) -> int:
    return int(models.greedy[row, step])


GREEDY: dict[str, Make] = {
    "to the length": lambda m: {},
    "one token": lambda m: {"max_new_tokens": 1},
    "two tokens": lambda m: {"max_new_tokens": 2},
    "max_length": lambda m: {"max_length": m.columns + 3, "max_new_tokens": None},
    "a stop of one sequence": lambda m: {"eos_token_id": said(m, 0, 2)},
    "a list of stops": lambda m: {"eos_token_id": [said(m, 0, 2), said(m, 1, 4)]},
    "stops at three steps": lambda m: {
        "eos_token_id": [said(m, 0, 1), said(m, 1, 3), said(m, 2, 5)],
        "pad_token_id": 9,
    },
    "everyone's first token": lambda m: {"eos_token_id": m.greedy[:, 0].tolist()},
    "all at once": lambda m: {"eos_token_id": m.greedy[:, 3].tolist()},
    "the last token": lambda m: {"eos_token_id": m.greedy[:, -1].tolist()},
    "a stop that is the pad": lambda m: {
        "eos_token_id": m.greedy[:, 2].tolist(),
        "pad_token_id": said(m, 0, 2),
    },
}


@pytest.mark.parametrize("make", GREEDY.values(), ids=GREEDY.keys())
def test_streams_what_hugging_face_streams(
    models: Twins, make: Make, launches: list[DeviceStep]
) -> None:
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, **make(models)}
    recorders = Recorder(), Recorder()
    ours, theirs = (
        model.generate(**models.inputs, **options, streamer=recorder)
        for model, recorder in zip((models.ours, models.stock), recorders, strict=True)
    )
    models.assert_same_output(ours, theirs)
    assert recorders[0].seen == recorders[1].seen
    assert_cache_is_as_theirs(models, ours, theirs)
    steps = ours.sequences.shape[1] - models.columns
    most = options["max_new_tokens"] or options["max_length"] - models.columns
    # The prompt yields the first token; launched past the end: never more than stops can hide.
    assert steps - 1 <= len(launches) <= min(most - 1, steps - 1 + AHEAD)
    assert all(step._chooses for step in launches)


def assert_cache_is_as_theirs(models: Twins, ours: Any, theirs: Any) -> None:
    """Columns, classes and bytes of the tokens that were fed, though more steps have run."""
    cache, fed = ours[CACHE_NAME], ours.sequences.shape[1] - 1
    assert isinstance(cache, PagedCache)
    assert cache.get_seq_length() == theirs[CACHE_NAME].get_seq_length() == fed
    generated = cache.seen.codes[:, models.columns :]
    assert (generated == CODES[TokenClass.GENERATED]).all()
    first = cache.seen.positions[:, models.columns - 1 : models.columns] + 1
    assert torch.equal(
        cache.seen.positions[:, models.columns :], first + torch.arange(generated.shape[1])
    )
    prompt = int(models.inputs["attention_mask"].sum())
    rows = prompt + len(generated) * generated.shape[1]
    assert cache.live_bytes() == fastskip.plan_of(models.ours).kv_bytes(0, rows)


def test_the_host_is_behind(models: Twins, launches: list[DeviceStep]) -> None:
    """Which the stops above must be late to see."""
    options = {"max_new_tokens": NEW, "eos_token_id": models.greedy[:, 2].tolist()}
    models.ours.generate(**models.inputs, **options)
    assert 2 < len(launches) <= 2 + AHEAD


def test_tokens_are_put_as_they_arrive(models: Twins, launches: list[DeviceStep]) -> None:
    counts: list[int] = []

    class Counter(Recorder):
        def put(self, value: Tensor) -> None:
            counts.append(len(launches))

    models.ours.generate(**models.inputs, max_new_tokens=NEW, streamer=Counter())
    # Prompt, first token, and then one a step, while one more is under way.
    assert counts == [0, 0, *(min(AHEAD + step, NEW - 1) for step in range(NEW - 1))]


def test_a_step_that_is_there_is_loaded_while_the_prompt_runs(
    models: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first one is made after the first token, which would have to wait for its capture."""
    events: list[str] = []
    load = StepState.load

    def note(*arguments: Any) -> None:
        events.append("load")
        load(*arguments)

    class Noting(Recorder):
        def put(self, value: Tensor) -> None:
            events.append("put")

    monkeypatch.setattr(StepState, "load", note)
    monkeypatch.setattr(models.ours._fastskip, "steps", DeviceSteps())
    for expected in (["put", "put", "load"], ["put", "load", "put"]):
        events.clear()
        models.ours.generate(**models.inputs, max_new_tokens=NEW, streamer=Noting())
        assert events[:3] == expected and events.count("load") == 1
    events.clear()
    models.ours.generate(**models.inputs, max_new_tokens=1, streamer=Noting())
    assert events == ["put", "put"]


def test_second_turn(models: Twins) -> None:
    """After stops, where steps ran too far."""
    options = {"max_new_tokens": NEW, "eos_token_id": models.greedy[:, 2].tolist()}
    more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    answers = []
    for model in (models.ours, models.stock):
        first = model.generate(**models.inputs, **options, return_dict_in_generate=True)
        ids = torch.cat((first.sequences, more), dim=1)
        ones = torch.ones(3, ids.shape[1] - models.columns, dtype=torch.long)
        mask = torch.cat((models.inputs["attention_mask"], ones), dim=1)
        answers.append(
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{CACHE_NAME: first[CACHE_NAME]},
                max_new_tokens=NEW,
                return_dict_in_generate=True,
            )
        )
    models.assert_same_output(*answers)


def test_embeddings(models: Twins, launches: list[DeviceStep]) -> None:
    ids = models.inputs["input_ids"].clamp_max(IMAGE_ID - 2)
    given = {
        "inputs_embeds": models.stock.get_input_embeddings()(ids).detach(),
        "attention_mask": models.inputs["attention_mask"],
        "max_new_tokens": NEW,
    }
    recorders = Recorder(), Recorder()
    answers = [
        model.generate(**given, streamer=recorder)
        for model, recorder in zip((models.ours, models.stock), recorders, strict=True)
    ]
    assert torch.equal(*answers) and answers[0].shape == (3, NEW)
    assert recorders[0].seen == recorders[1].seen and len(launches) == NEW - 1


class Twice(StoppingCriteria):
    """Stops a sequence after two of its tokens were even; keeps all it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        return (input_ids[:, -NEW:] % 2 == 0).sum(1) >= 2


class Lowers(LogitsProcessor):
    """Takes away what was said last, in place; keeps all it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        return scores.scatter_(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize("kind", [Twice, Lowers])
def test_who_wants_to_see_every_step_does(
    models: Twins, launches: list[DeviceStep], kind: type[Any]
) -> None:
    watchers = kind(), kind()
    answers = []
    for model, watcher in zip((models.ours, models.stock), watchers, strict=True):
        options: Options = {"logits_processor": LogitsProcessorList([watcher])}
        if kind is Twice:
            options = {"stopping_criteria": StoppingCriteriaList([watcher])}
        answers.append(model.generate(**models.inputs, max_new_tokens=NEW, **options))
    assert torch.equal(*answers)
    assert watchers[0].seen == watchers[1].seen != []
    # One step at a time: none of them in vain, and no token was chosen on the device.
    assert len(launches) == answers[0].shape[1] - models.columns - 1
    assert not any(step._chooses for step in launches)


@pytest.mark.parametrize(
    "options",
    [
        {"max_time": 60.0},
        {"stop_strings": ["zzz"]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"repetition_penalty": 1.1},
        {"do_sample": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_which_options_need_each_step(
    llava: Twins, launches: list[DeviceStep], options: Options
) -> None:
    if "stop_strings" in options:
        from tests.checkpoints import build_tokenizer

        options = options | {"tokenizer": build_tokenizer()}
    llava.assert_same(max_new_tokens=3, **options)
    assert len(launches) == 2 and not any(step._chooses for step in launches)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("bad", [1, 2, 3, 5])
def test_a_streamer_that_raises(llava: Twins, bad: int, do_sample: bool) -> None:
    """The kept cache then holds what Hugging Face's loop leaves in it; both go on."""

    class Breaks(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.seen) > bad:
                raise ConnectionError

    ids = llava.inputs["input_ids"]
    ones = torch.ones(3, 1, dtype=torch.long)
    second = {
        "input_ids": torch.cat((ids, ones * 5), dim=1),
        "attention_mask": torch.cat((llava.inputs["attention_mask"], ones), dim=1),
    }
    lengths, answers = [], []
    for model in (llava.ours, llava.stock):
        first = model.generate(**llava.inputs, max_new_tokens=1, return_dict_in_generate=True)
        cache = first[CACHE_NAME]
        torch.manual_seed(0)
        with pytest.raises(ConnectionError):
            model.generate(
                **second,
                **{CACHE_NAME: cache},
                max_new_tokens=NEW,
                streamer=Breaks(),
                do_sample=do_sample,
            )
        lengths.append(cache.get_seq_length())
        cache.crop(-bad)
        answers.append(model.generate(**second, **{CACHE_NAME: cache}, max_new_tokens=NEW))
    assert lengths == [llava.columns + bad] * 2
    assert torch.equal(*answers)
    assert torch.equal(
        llava.ours.generate(**llava.inputs, max_new_tokens=NEW)[:, -NEW:], llava.greedy
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(tiny_llava(), seed=4, images=(2, 0, 1), padding="right", extra_columns=1)


@pytest.mark.parametrize("name", MIXED)
def test_under_a_policy(batch: Batch, name: str, launches: list[DeviceStep]) -> None:
    """Stops of two sequences, against computing everything again."""
    stock = tiny_llava()
    with torch.no_grad():
        stock.get_output_embeddings().weight[-2:] = 0  # reserved ids are never the best
    free = greedy(stock, MIXED[name], batch, NEW)
    stops = [int(free[0, 2]), int(free[2, 4])]
    model = fastskip.apply_(copy.deepcopy(stock), MIXED[name], impl=IMPL)
    out = model.generate(
        **batch.inputs(), max_new_tokens=NEW, eos_token_id=stops, return_dict_in_generate=True
    )
    tokens = out.sequences[:, batch.columns :]
    for row, expected in zip(tokens.tolist(), free.tolist(), strict=True):
        ends = [step for step, token in enumerate(expected) if token in stops]
        length = ends[0] + 1 if ends else NEW
        assert row == (expected[:length] + [0] * NEW)[: len(row)]
    assert out[CACHE_NAME].columns == batch.columns + tokens.shape[1] - 1
    assert len(launches) <= tokens.shape[1] - 1 + AHEAD
