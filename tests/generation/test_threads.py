"""Threads: two on two models run side by side, two on one model run one after the other."""

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from tests.batches import Batch, random_batch
from tests.models import tiny_llava

SKIP_GENERATED_FFN = {
    "schema_version": 1,
    "rules": [
        {"layers": "1:3", "tokens": ["generated"], "skip": ["ffn"]},
        {"layers": [2], "tokens": ["image"], "skip": ["block"]},
    ],
}
NEW = 12


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_llava()


@pytest.fixture(scope="module")
def batches(stock: Any) -> tuple[Batch, Batch]:
    """Of different sizes and lengths, so that a mix-up of their states cannot go unseen."""
    return random_batch(stock, 1, images=(2, 0, 1)), random_batch(stock, 2, images=(1,))


def answer(model: Any, batch: Batch, **options: Any) -> list[list[int]]:
    tokens: list[list[int]] = model.generate(
        **batch.inputs(), max_new_tokens=NEW, **options
    ).tolist()
    return tokens


def together(*works: Callable[[], Any]) -> list[Any]:
    """The results of functions that are started at once, each in a thread of its own."""
    results: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = works[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return results


def test_two_models(stock: Any, batches: tuple[Batch, Batch]) -> None:
    models = [
        fastskip.apply_(copy.deepcopy(stock), policy) for policy in ("dense", SKIP_GENERATED_FFN)
    ]
    alone = [answer(model, batch) for model, batch in zip(models, batches, strict=True)]
    for _ in range(3):
        both = together(
            lambda: answer(models[0], batches[0]), lambda: answer(models[1], batches[1])
        )
        assert both == alone


def test_one_model(stock: Any, batches: tuple[Batch, Batch]) -> None:
    model = fastskip.apply_(copy.deepcopy(stock), SKIP_GENERATED_FFN)
    alone = [answer(model, batch) for batch in batches]
    for _ in range(3):
        both = together(lambda: answer(model, batches[0]), lambda: answer(model, batches[1]))
        assert both == alone


def test_the_second_thread_waits(stock: Any, batches: tuple[Batch, Batch]) -> None:
    """Calls record their steps; one call's are never split by another's."""
    model = fastskip.apply_(copy.deepcopy(stock), SKIP_GENERATED_FFN)
    steps: list[str] = []

    class Note(StoppingCriteria):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            steps.append(self.name)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def noted(name: str, batch: Batch) -> Callable[[], Any]:
        return lambda: answer(model, batch, stopping_criteria=StoppingCriteriaList([Note(name)]))

    together(noted("a", batches[0]), noted("b", batches[1]))
    assert sorted(steps) == ["a"] * NEW + ["b"] * NEW
    assert steps in (["a"] * NEW + ["b"] * NEW, ["b"] * NEW + ["a"] * NEW)


def test_a_forward_waits_for_generate(stock: Any, batches: tuple[Batch, Batch]) -> None:
    """A forward beside ``generate`` must not take its own columns for generated ones."""
    model = fastskip.apply_(copy.deepcopy(stock), SKIP_GENERATED_FFN)

    @torch.no_grad()
    def forward() -> list[float]:
        values: list[float] = model(**batches[1].inputs()).logits.flatten().tolist()
        return values

    expected = [answer(model, batches[0]), forward()]
    for _ in range(3):
        assert together(lambda: answer(model, batches[0]), forward) == expected


def test_a_policy_is_not_swapped_under_a_running_call(
    stock: Any, batches: tuple[Batch, Batch]
) -> None:
    model = fastskip.apply_(copy.deepcopy(stock))
    expected = answer(model, batches[0])
    swap = threading.Thread(target=fastskip.set_policy, args=(model, SKIP_GENERATED_FFN))

    class Swap(StoppingCriteria):
        """Asks for the other policy on the way, and gives the request time."""

        waits = False

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if swap.ident is None:
                swap.start()
                swap.join(timeout=0.2)
                self.waits = swap.is_alive()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    criteria = Swap()
    result = answer(model, batches[0], stopping_criteria=StoppingCriteriaList([criteria]))
    assert criteria.waits and result == expected
    swap.join(timeout=60)
    assert fastskip.plan_of(model).policy == fastskip.SkipPolicy.from_dict(SKIP_GENERATED_FFN)
    assert answer(model, batches[0]) != expected


def test_an_error_lets_the_next_one_in(stock: Any, batches: tuple[Batch, Batch]) -> None:
    model = fastskip.apply_(copy.deepcopy(stock))
    with pytest.raises(ValueError, match="cache_implementation"):
        answer(model, batches[0], cache_implementation="static")
    expected = answer(model, batches[0])
    assert together(lambda: answer(model, batches[0])) == [expected]


class Once(StoppingCriteria):
    """Calls a function after the first token; then gives what it started some time."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function, self._is_due = function, True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._is_due:
            self._is_due = False
            self._function()
            time.sleep(0.2)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_the_model_without_a_head_waits_for_generate(
    stock: Any, batches: tuple[Batch, Batch]
) -> None:
    """As a forward of the whole model does; its prompt is longer than that of ``generate``."""
    model = fastskip.apply_(copy.deepcopy(stock), SKIP_GENERATED_FFN)
    found: list[torch.Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        found.append(model.model(**batches[0].inputs()).last_hidden_state)

    forward()
    beside = threading.Thread(target=forward)
    short = torch.tensor([[3, 4, 5]])
    model.generate(
        short, max_new_tokens=3, stopping_criteria=StoppingCriteriaList([Once(beside.start)])
    )
    beside.join(timeout=60)
    assert torch.equal(*found)


def test_a_second_turn_keeps_its_places_beside_another_conversation() -> None:
    """Hugging Face's model holds the end of one conversation's places in time, height and width."""
    model = fastskip.apply_(tiny_llava("qwen2_vl"))
    first, other = (random_batch(model, 1, images=(count,)) for count in (1, 0))
    told = model.generate(**first.inputs(), max_new_tokens=3, return_dict_in_generate=True)
    found: list[torch.Tensor] = []

    def second_turn() -> None:
        cache = copy.deepcopy(told[CACHE_NAME])
        ids = torch.cat((told.sequences, torch.tensor([[3, 4]])), dim=1)
        options = {"output_logits": True, "return_dict_in_generate": True, CACHE_NAME: cache}
        found.append(model.generate(ids, max_new_tokens=1, **options).logits[0])

    second_turn()
    beside = threading.Thread(target=second_turn)

    with model._fastskip.running():  # as in a call that has just begun
        beside.start()
        time.sleep(0.2)
        model.generate(**other.inputs(), max_new_tokens=3)
    beside.join(timeout=60)
    assert torch.equal(*found)


def in_a_thread_numbered(number: int | None, work: Callable[[], object]) -> None:
    """Does some work in a new thread that the system gives this number, which an ended thread had;
    in none if it gives it to no one."""
    ready = threading.Event()

    def run() -> None:
        if threading.get_ident() == number:
            work()
        ready.wait(timeout=60)

    threads = [threading.Thread(target=run) for _ in range(32)]
    for thread in threads:
        thread.start()
    ready.set()
    for thread in threads:
        thread.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("by_thread", [False, True])
def test_a_process_forked_beside_generate_waits_for_nobody(
    stock: Any, batches: tuple[Batch, Batch], by_thread: bool
) -> None:
    """The call that was running goes on in the parent only, even if a thread of the child gets the
    number of the one that runs it."""
    model = fastskip.apply_(copy.deepcopy(stock), SKIP_GENERATED_FFN)
    expected = answer(model, batches[1])
    runs, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        runs.set()
        goes_on.wait(timeout=60)

    held = threading.Thread(
        target=answer,
        args=(model, batches[0]),
        kwargs={"stopping_criteria": StoppingCriteriaList([Once(hold)])},
    )
    held.start()
    assert runs.wait(timeout=60)
    child = os.fork()
    if not child:
        is_same, found = False, []
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # ends a child that waits for ever
            torch.set_num_threads(1)  # torch's other threads are gone
            if by_thread:
                in_a_thread_numbered(held.ident, lambda: found.append(answer(model, batches[1])))
            fastskip.set_policy(model, SKIP_GENERATED_FFN)
            found.append(answer(model, batches[1]))
            is_same = all(each == expected for each in found)
        finally:
            os._exit(not is_same)
    status = os.waitpid(child, 0)[1]
    goes_on.set()
    held.join(timeout=60)
    assert not status
    assert answer(model, batches[1]) == expected
