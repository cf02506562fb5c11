"""One model twice, untouched and prepared with an empty policy, and what "says the same" means."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastskip
from tests.batches import random_batch
from tests.checkpoints import VOCAB
from tests.models import LLAVA_KINDS, RELATIVES, tiny_llama, tiny_llava, tiny_opt

NEW = 8
"""Tokens that a test asks for, unless the number is its subject."""

MULTIPLE = 4.0
"""How much larger our rounding errors may be than those that the untouched model has itself."""

MAKERS: dict[str, Any] = {
    kind: functools.partial(tiny_llava, kind) for kind in LLAVA_KINDS + RELATIVES
} | {"llama": tiny_llama, "opt": tiny_opt}


@dataclass(frozen=True)
class Twins:
    """An untouched model, the same weights prepared with an empty policy, and prompts."""

    stock: Any
    ours: Any
    inputs: dict[str, Any]
    greedy: Tensor
    """[batch, NEW]: what the untouched model says; for options that name tokens"""
    rounding: float
    """Error of the untouched model's logits against fp64, relative to the largest"""

    @property
    def columns(self) -> int:
        """Length of the prompts, pads included."""
        width: int = self.inputs["input_ids"].shape[1]
        return width

    def assert_same(self, **options: Any) -> tuple[Any, Any]:
        """Generate with both: tokens must be equal, scores within rounding. Return both results."""
        results = []
        for model in (self.ours, self.stock):
            torch.manual_seed(7)
            results.append(model.generate(**{**self.inputs, **options}))
        ours, theirs = results
        self.assert_same_output(ours, theirs)
        return ours, theirs

    def assert_same_output(self, ours: Any, theirs: Any) -> None:
        """Compare two results of `generate`."""
        if isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs)
            return
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours.sequences, theirs.sequences)
        for name in ("scores", "logits"):
            pairs = zip(ours.get(name) or (), theirs.get(name) or (), strict=True)
            for step, (actual, expected) in enumerate(pairs):
                self.assert_close(f"{name}[{step}]", actual, expected)
        for name in ("sequences_scores",):
            if theirs.get(name) is not None:
                self.assert_close(name, ours[name], theirs[name])

    def assert_close(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Equal up to rounding at the size of the largest finite value; infinities exactly."""
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
        finite = expected.isfinite()
        assert torch.equal(actual[~finite], expected[~finite]), name
        if not finite.any():
            return
        actual, expected = actual[finite], expected[finite]
        allowed = MULTIPLE * self.rounding * float(expected.abs().max())
        error = float((actual - expected).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def twins(kind: str, *, sequences: int = 3, impl: str | None = None) -> Twins:
    """`kind`: one of LLaVA (ragged left-padded prompts with two images, none and one), "llama" or
    "opt"."""
    is_llava = kind in LLAVA_KINDS + RELATIVES
    stock: Any = MAKERS[kind](vocab=VOCAB)
    images = (2, 0, 1)[:sequences] if is_llava else (0,) * sequences
    batch = random_batch(stock, images=images, seed=1)
    inputs = batch.inputs()
    with torch.no_grad():
        logits = stock(**inputs).logits[batch.real]
        exact = copy.deepcopy(stock).double()(**_double(inputs)).logits[batch.real]
    rounding = float((logits - exact).abs().max() / exact.abs().max())
    greedy = stock.generate(**inputs, max_new_tokens=NEW)[:, -NEW:]
    ours = fastskip.apply_(copy.deepcopy(stock), impl=impl)
    return Twins(stock, ours, inputs, greedy, rounding)


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
