"""Merged parameters leave the model with storages of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.merging import MOVES, groups, is_merged, logits
from tests.models import tiny_llama


@pytest.fixture
def stock() -> Any:
    return tiny_llama(attention_bias=True, mlp_bias=True)


def test_tensors_have_storages_of_their_own(stock: Any, model: Any) -> None:
    state, expected = model.state_dict(), stock.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_after_a_move(model: Any, move: Callable[[Any], Any]) -> None:
    moved = move(model)
    logits(moved)
    for name, tensor in moved.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    # However often a layer was merged, its tensors are copied once.
    hooks = [len(m._state_dict_hooks) for modules in groups(moved) for m in modules]
    assert set(hooks) == {1}


def test_parameters_leave_as_they_are(model: Any) -> None:
    state, named = model.state_dict(keep_vars=True), dict(model.named_parameters())
    assert all(state[name] is parameter for name, parameter in named.items())
    assert is_merged(model)


def test_accelerate_saves_every_key(stock: Any, model: Any, tmp_path: Path) -> None:
    """They drop views of a larger storage without a word."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator().save_model(model, str(tmp_path))
    accelerate.utils.save(model.state_dict(), tmp_path / "state", safe_serialization=True)
    expected = stock.state_dict()
    for file in (tmp_path / "model.safetensors", tmp_path / "state"):
        saved = load_file(file)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)
