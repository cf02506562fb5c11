"""Hugging Face's own tests of models and of `generate`, run on prepared models.

A pytest plugin, for a checkout of transformers at the installed version:

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    cd transformers && python -m pytest -rx -p benchmarks.hugging_face_suite \\
        tests/models/llava tests/models/qwen2_vl   # any family that fastskip runs

Each test builds its own small models, which the plugin prepares with an empty policy. What
fastskip explicitly refuses counts as an expected failure, with the refusal as its reason (`-rx`
lists them).
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from typing import Any

import pytest

from fastskip.families import MULTIMODAL, TEXT_ONLY, UnsupportedModelError
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.loading import apply_

REFUSALS = (
    "output_attentions: True; allowed: False",
    "cache_implementation: 'static'; allowed: None",
    f"{CACHE_NAME}: ",
    "; needed: [",  # four-dimensional masks
    "position_ids: several sequences packed",
    "with right-padded prompts",
    "is never called; allowed: hooks on",
)
"""Parts of the messages with which fastskip refuses what it does not support."""
LOOKS_INSIDE = {
    "test_generate_continue_from_past_key_values": "compares caches layer by layer",
    "test_generate_continue_from_inputs_embeds": "compares caches layer by layer",
    "test_all_tensors_are_parameter_or_buffer": "reads the source of the class",
    "test_generate_compile_model_forward_fullgraph": "expects a DynamicCache",
    "test_generate_compilation_all_outputs": "expects a StaticCache",
    "test_retain_grad_hidden_states_attentions": "needs gradients of attention weights",
    "test_forward_with_rope_deltas_cached": "compares logits of padding, which has no rows",
}
"""Tests of internals that a prepared model implements differently."""


class Prepared:
    """A model class whose instances are prepared; otherwise the class itself."""

    def __init__(self, model_class: Any, impl: str | None) -> None:
        self._model_class, self._impl = model_class, impl

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._prepare(self._model_class(*arguments, **options))

    def _from_config(self, *arguments: Any, **options: Any) -> Any:
        return self._prepare(self._model_class._from_config(*arguments, **options))

    def from_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """As Hugging Face's, including loading info if that is requested."""
        found = self._model_class.from_pretrained(*arguments, **options)
        if isinstance(found, tuple):
            return (self._prepare(found[0]), *found[1:])
        return self._prepare(found)

    def _prepare(self, model: Any) -> Any:
        if any(parameter.is_meta for parameter in model.parameters()):
            return model  # a shell without weights
        return apply_(model, impl=self._impl)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_class, name)

    def __eq__(self, other: object) -> bool:
        known = other._model_class if isinstance(other, Prepared) else other
        return known is self._model_class

    def __hash__(self) -> int:
        return hash(self._model_class)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--impl", help="implementation, as in fastskip.load_model")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives each test case prepared classes in its setUp."""
    cases = {item.cls for item in items if isinstance(item, pytest.Function) and item.cls}
    for case in cases:
        if hasattr(case, "all_model_classes"):
            case.setUp = _with_prepared_classes(case.setUp, config.getoption("--impl"))


def _with_prepared_classes(set_up: Any, impl: str | None) -> Any:
    known = {*MULTIMODAL.values(), *TEXT_ONLY.values()}

    @functools.wraps(set_up)
    def wrapped(self: Any) -> None:
        set_up(self)
        theirs = [each for each in self.all_model_classes if each.__name__ in known]
        if not theirs:
            self.skipTest("none of its classes is one that fastskip prepares")
        self.all_model_classes = tuple(Prepared(each, impl) for each in theirs)

    return wrapped


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports a refusal as an expected failure."""
    report = yield
    if report.failed and call.excinfo is not None:
        reason = _refusal(item, call.excinfo.value)
        if reason is not None:
            report.outcome, report.wasxfail = "skipped", reason
    return report


def _refusal(item: pytest.Item, error: BaseException) -> str | None:
    said = str(error)
    if isinstance(error, UnsupportedModelError) or any(each in said for each in REFUSALS):
        return said
    return LOOKS_INSIDE.get(item.name)
