"""A policy that was made for another model: who is told, and what."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import fastskip
from fastskip import PolicyError, PolicyFitWarning, SkipPolicy
from fastskip.fingerprints import model_fingerprint
from fastskip.policy_fit import made_for
from tests.checkpoints import save_checkpoint
from tests.models import tiny_llama, tiny_llava, tiny_opt


def policy(told: Any) -> SkipPolicy:
    rules = SkipPolicy.preset("image_ffn").rules
    return SkipPolicy(rules, name="mine", provenance={"made_for": told})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def told(checkpoint: Path) -> dict[str, Any]:
    return made_for(fastskip.load_model(checkpoint, "frozen_visual"))


def test_what_is_told(told: dict[str, Any], checkpoint: Path) -> None:
    assert told.keys() == {"model", "fingerprint", "depth", "hidden_size", "dtype"}
    assert (told["depth"], told["hidden_size"], told["dtype"]) == (4, 32, "bfloat16")
    assert told["model"] == str(checkpoint) and len(told["fingerprint"]) == 16
    # Whoever holds the weights, under any policy.
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    assert made_for(plain) == told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_model_is_silent(checkpoint: Path, told: dict[str, Any], dtype: str) -> None:
    """In whatever dtype, and wherever it lay."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = policy({**told, "model": "elsewhere/" + checkpoint.name, "more": 1})
        model = fastskip.load_model(checkpoint, own, dtype=dtype)
        fastskip.set_policy(model, own)
        # Another name for the same weights is the same model.
        fastskip.set_policy(model, policy({**told, "model": "another/name"}))
        fastskip.set_policy(model, policy({}))


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_llava])
def test_fingerprints_of_float16(make: Any) -> None:
    """Checkpoints of float16, as LLaVA-1.5's, give the same in all dtypes."""
    model = make(dtype=torch.float16)
    with torch.no_grad():
        for weight in model.parameters():  # down to where float16 has few digits left
            weight.mul_(
                torch.logspace(0, -5, weight.shape[0]).half().view(-1, *[1] * (weight.ndim - 1))
            )
    own = model_fingerprint(model)
    assert own == model_fingerprint(model.bfloat16()) != model_fingerprint(make(seed=1))
    assert own == model_fingerprint(model.float()) == model_fingerprint(model.half())


def test_fingerprints_know_layers_but_no_outer_names() -> None:
    model = tiny_llava()
    own = model_fingerprint(model)
    holder = torch.nn.Module()
    holder.renamed = model
    assert model_fingerprint(holder) == own
    layers = model.model.language_model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert model_fingerprint(model) != own


def test_another_model_is_told_what_differs(checkpoint: Path, told: dict[str, Any]) -> None:
    other = {**told, "fingerprint": "0" * 16, "model": "llava-hf/other"}
    with pytest.warns(PolicyFitWarning) as seen:
        model = fastskip.load_model(checkpoint, policy(other), dtype="float32")
    (warning,) = seen
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith("policy 'mine' was made for a different model")
    assert f"model: llava-hf/other, here {checkpoint}" in text
    assert f"weights' fingerprint: {'0' * 16}, here {told['fingerprint']}" in text
    assert "dtype (which alone would not matter): bfloat16, here float32" in text
    assert "depth" not in text and "hidden size" not in text
    assert fastskip.plan_of(model).policy == policy({})
    for verb in (fastskip.set_policy, fastskip.apply_):
        with pytest.warns(PolicyFitWarning, match="weights' fingerprint") as seen:
            verb(model, policy(other))
        assert [warning.filename for warning in seen] == [__file__]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.warns(PolicyFitWarning, match="weights' fingerprint"):
        fastskip.set_policy(model, policy(told))


def test_sizes_are_told_without_reading_weights(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(model: Any) -> str:
        raise AssertionError("weights were read")

    monkeypatch.setattr("fastskip.policy_fit.model_fingerprint", read)
    message = "depth: 9, here 4; hidden size: 64, here 32"
    with pytest.warns(PolicyFitWarning, match=message):
        model = fastskip.apply_(tiny_llava(), policy({**told, "depth": 9, "hidden_size": 64}))
    # Only a name to go by.
    with pytest.warns(PolicyFitWarning, match="model: a/b, here"):
        fastskip.set_policy(model, policy({"model": "a/b"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for silent in ("dense", "image_ffn", policy({}), SkipPolicy(provenance={"by": "me"})):
            fastskip.set_policy(model, silent)
            fastskip.apply_(tiny_llava(), silent)


@pytest.mark.parametrize(
    ("told", "field"),
    [
        ("llava", "provenance.made_for"),
        ({"depth": "32"}, "provenance.made_for.depth"),
        ({"depth": True}, "provenance.made_for.depth"),
        ({"fingerprint": None}, "provenance.made_for.fingerprint"),
    ],
)
def test_malformed_origins(checkpoint: Path, told: Any, field: str) -> None:
    with pytest.raises(PolicyError, match=f"{field}:"):
        fastskip.load_model(checkpoint, policy(told))
    model = tiny_llava()
    with pytest.raises(PolicyError, match=f"{field}:"):
        fastskip.apply_(model, policy(told))
    # Nothing has happened to it.
    assert getattr(model, "_fastskip", None) is None
    fastskip.apply_(model, "image_ffn")
    with pytest.raises(PolicyError, match=f"{field}:"):
        fastskip.set_policy(model, policy(told))
    assert fastskip.plan_of(model).policy == SkipPolicy.preset("image_ffn")
