"""Learned positions in decode steps: in the graph's first kernel, and never stale ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastskip
from fastskip.families import final_norm_of, text_model_of
from fastskip.generation.device_step import DeviceStep
from tests.agreement import generate
from tests.batches import Batch, random_batch
from tests.device.conftest import IMPL
from tests.device.test_executor import WAYS, second_turn
from tests.models import tiny_llava
from tests.policies import MIXED

NEW = 6
POLICY = MIXED["each class its own rule"]


@pytest.fixture
def stock() -> Any:
    return tiny_llava("llava_opt")


@pytest.fixture
def batch(stock: Any) -> Batch:
    return random_batch(stock, seed=1, images=(2, 0, 1))


def replace_table(text_model: Any) -> None:
    table = text_model.embed_positions
    table.weight = nn.Parameter(table.weight.detach().flip(0))


def give_other_data(text_model: Any) -> None:
    weight = text_model.embed_positions.weight
    weight.data = weight.data.flip(0)


def write_into_it(text_model: Any) -> None:
    with torch.no_grad():
        text_model.embed_positions.weight.mul_(-1)


def hook(module: Any) -> None:
    module.register_forward_hook(lambda _m, _i, out: out.flip(-1))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "table": replace_table,
    "data of the table": give_other_data,
    "hook on the table": lambda model: hook(model.embed_positions),
    "hook on the embedding": lambda model: hook(model.embed_tokens),
    "hook on the final norm": lambda model: hook(final_norm_of(model)),
    "numbers in place": write_into_it,
}


@pytest.mark.parametrize("name", CHANGES)
def test_stale_steps_are_thrown_away(stock: Any, batch: Batch, name: str) -> None:
    model = fastskip.apply_(copy.deepcopy(stock), POLICY, impl=IMPL)
    plain = fastskip.apply_(stock, POLICY, impl="reference")
    before = generate(model, batch, NEW)
    assert torch.equal(before, generate(plain, batch, NEW))
    (old,) = model._fastskip.steps._steps.values()
    for each in (model, plain):
        CHANGES[name](text_model_of(each))
    after = generate(model, batch, NEW)
    assert torch.equal(after, generate(plain, batch, NEW))
    assert not torch.equal(after, before)
    assert (old in model._fastskip.steps._steps.values()) == (name == "numbers in place")


def test_steps_are_replayed(stock: Any, batch: Batch, launches: list[DeviceStep]) -> None:
    model = fastskip.apply_(stock, POLICY, impl=IMPL)
    generate(model, batch, NEW)
    assert len(launches) == NEW - 1
    launches.clear()
    hook(text_model_of(model).embed_positions)
    generate(model, batch, NEW)
    assert not launches  # what a hook does once must not be replayed


@pytest.mark.parametrize("way", ["beams", "several samples", "penalty"])
def test_ways_to_generate(stock: Any, way: str) -> None:
    """As the plain runtime with the same seed."""
    # At most one image each: with several, transformers 5.17 gives beams the wrong ones.
    batch = random_batch(stock, 4, images=(1, 0, 1))
    answers = []
    for impl in ("reference", IMPL):
        model = fastskip.apply_(copy.deepcopy(stock), POLICY, impl=impl)
        torch.manual_seed(3)
        options = {"suppress_tokens": [62, 63], **WAYS[way]}
        answers.append(model.generate(**batch.inputs(), max_new_tokens=NEW, **options))
    assert torch.equal(*answers)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_second_turn(stock: Any, padding: Any) -> None:
    batch = random_batch(stock, 1, images=(2, 0, 1), padding=padding, extra_columns=1)
    ours, theirs = (
        second_turn(fastskip.apply_(copy.deepcopy(stock), POLICY, impl=impl), batch, "new ids")
        for impl in (IMPL, "reference")
    )
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2].seen.positions, theirs[2].seen.positions)
