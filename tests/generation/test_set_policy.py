"""Which policy a model gets, and how it is swapped."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlavaForConditionalGeneration

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from tests.checkpoints import VOCAB, answer
from tests.models import tiny_llava

SKIP_IMAGE_FFN = {
    "schema_version": 1,
    "rules": [{"layers": "1:3", "tokens": ["image"], "skip": ["ffn"]}],
}


def test_which_one_is_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fastskip")
    assert fastskip.plan_of(fastskip.load_model(folder)).is_dense
    assert "dense" in caplog.text
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["per_layer_config"] = {"2": {"skip": ["mlp"]}, "1": {"skip": []}}
    (folder / "config.json").write_text(json.dumps(config))
    caplog.clear()
    rules = fastskip.plan_of(fastskip.load_model(folder)).policy.to_dict()["rules"]
    assert rules == [{"layers": [2], "tokens": "all", "skip": ["ffn"]}]
    assert "per_layer_config" in caplog.text
    (folder / "fastskip_policy.json").write_text(json.dumps(SKIP_IMAGE_FFN))
    caplog.clear()
    taken = fastskip.plan_of(fastskip.load_model(folder)).policy
    assert taken == fastskip.SkipPolicy.from_dict(SKIP_IMAGE_FFN)
    assert "fastskip_policy.json" in caplog.text
    assert fastskip.plan_of(fastskip.load_model(folder, "dense")).is_dense


def test_forms(checkpoint: Path, tmp_path: Path) -> None:
    policy = fastskip.SkipPolicy.from_dict(SKIP_IMAGE_FFN)
    policy.save(tmp_path / "policy.json")
    for form in (
        policy,
        SKIP_IMAGE_FFN,
        tmp_path / "policy.json",
        str(tmp_path / "policy.json"),
    ):
        assert fastskip.plan_of(fastskip.load_model(checkpoint, form)).policy == policy


def test_swapping_and_swapping_back(checkpoint: Path, expected: list[list[int]]) -> None:
    model = fastskip.load_model(checkpoint)
    assert fastskip.set_policy(model, SKIP_IMAGE_FFN) is model
    assert answer(model) != expected
    assert fastskip.apply_(model) is model
    assert answer(model) == expected


def test_a_cache_of_another_policy_is_refused(checkpoint: Path) -> None:
    model = fastskip.load_model(checkpoint)
    ids = torch.tensor([[4, 5, 6]])
    cache = model(input_ids=ids)[CACHE_NAME]
    fastskip.set_policy(model, SKIP_IMAGE_FFN)
    with pytest.raises(ValueError, match=f"{CACHE_NAME}: .*another policy"):
        model(input_ids=ids, **{CACHE_NAME: cache})
    with pytest.raises(TypeError, match=f"{CACHE_NAME}: .*DynamicCache"):
        model(input_ids=ids, **{CACHE_NAME: transformers.DynamicCache()})


def test_a_bad_policy_leaves_the_old_one(checkpoint: Path) -> None:
    model = fastskip.load_model(checkpoint, SKIP_IMAGE_FFN)
    bad = {"schema_version": 1, "rules": [{"layers": [9], "tokens": "all", "skip": ["ffn"]}]}
    with pytest.raises(fastskip.PolicyError):
        fastskip.set_policy(model, bad)
    assert fastskip.plan_of(model).policy == fastskip.SkipPolicy.from_dict(SKIP_IMAGE_FFN)


def test_two_models_do_not_disturb_each_other(expected: list[list[int]]) -> None:
    stock: Any = tiny_llava(vocab=VOCAB)
    dense = fastskip.apply_(copy.deepcopy(stock))
    skipping = fastskip.apply_(copy.deepcopy(stock), SKIP_IMAGE_FFN)
    first = answer(skipping)
    assert answer(dense) == expected != first
    assert answer(skipping) == first


def test_unprepared_models_stay_what_they_are(expected: list[list[int]]) -> None:
    stock: Any = tiny_llava(vocab=VOCAB)
    prepared: Any = fastskip.apply_(copy.deepcopy(stock), SKIP_IMAGE_FFN)
    assert type(stock) is LlavaForConditionalGeneration is not type(prepared)
    assert answer(stock) == expected
    with pytest.raises(TypeError, match="not prepared"):
        fastskip.plan_of(stock)
    # One made from the prepared class itself is an ordinary model until it is prepared.
    other = type(prepared)(stock.config).eval()
    other.load_state_dict(stock.state_dict())
    other.generation_config = stock.generation_config
    assert answer(other) == expected
