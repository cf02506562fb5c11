"""A prepared model on disk: an ordinary checkpoint, and its policy beside it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import fastskip
from tests.batches import Batch, random_batch
from tests.checkpoints import VOCAB
from tests.models import tiny_llava

POLICY_FILE = "fastskip_policy.json"


def policy(*rules: tuple[Any, Any, list[str]], **more: Any) -> dict[str, Any]:
    written = [{"layers": at, "tokens": tokens, "skip": skip} for at, tokens, skip in rules]
    return {"schema_version": 1, "rules": written, **more}


ALL_TOKENS = policy(([1, 2], "all", ["attention"]), ([2, 3], "all", ["ffn"]))
SOME_TOKENS = policy(([1], ["image"], ["ffn"]), name="images only")


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_llava(vocab=VOCAB)


@pytest.fixture(scope="module")
def batch(stock: Any) -> Batch:
    return random_batch(stock, images=(1, 2))


@pytest.fixture
def model(stock: Any) -> Any:
    return fastskip.apply_(copy.deepcopy(stock), SOME_TOKENS)


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    out: Tensor = model(**batch.inputs()).logits[batch.real]
    return out


def test_stock_hugging_face_reads_it(stock: Any, model: Any, batch: Batch, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again) is LlavaForConditionalGeneration
    assert torch.equal(logits(again, batch), logits(stock, batch))
    assert again.config.architectures == ["LlavaForConditionalGeneration"]


def test_it_is_the_checkpoint_that_stock_would_write(
    stock: Any, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "theirs")
    ours, theirs = ({p.name for p in (tmp_path / side).iterdir()} for side in ("ours", "theirs"))
    assert ours == theirs | {POLICY_FILE}
    for name in theirs - {"model.safetensors"}:
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    tensors = []
    for side in ("ours", "theirs"):
        with safe_open(tmp_path / side / "model.safetensors", "pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_fastskip_reads_it(model: Any, batch: Batch, tmp_path: Path, size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = fastskip.load_model(tmp_path)
    assert fastskip.plan_of(again).policy == fastskip.plan_of(model).policy
    assert fastskip.plan_of(again).policy.name == "images only"
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_the_policy_is_the_one_at_hand(model: Any, tmp_path: Path) -> None:
    fastskip.set_policy(model, ALL_TOKENS)
    model.save_pretrained(tmp_path)
    saved = fastskip.SkipPolicy.from_file(tmp_path / POLICY_FILE)
    assert saved == fastskip.SkipPolicy.from_dict(ALL_TOKENS)


def layer_overrides(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["text_config"].get("per_layer_config")


def test_per_layer_config_only_on_request(model: Any, batch: Batch, tmp_path: Path) -> None:
    fastskip.set_policy(model, ALL_TOKENS)
    model.save_pretrained(tmp_path / "plain")
    assert layer_overrides(tmp_path / "plain") is None
    model.save_pretrained(tmp_path / "export", export_per_layer_config=True)
    assert layer_overrides(tmp_path / "export") == {
        "1": {"skip": ["attention"]},
        "2": {"skip": ["attention", "mlp"]},
        "3": {"skip": ["mlp"]},
    }
    # Saving leaves the model's own config as it was.
    assert model.config.text_config.to_dict().get("per_layer_config") is None
    (tmp_path / "export" / POLICY_FILE).unlink()
    again = fastskip.load_model(tmp_path / "export")
    assert fastskip.plan_of(again).fingerprint == fastskip.plan_of(model).fingerprint
    assert torch.equal(logits(again, batch), logits(model, batch))
    # What was read from a config is not written again without being asked for.
    fastskip.set_policy(again, SOME_TOKENS)
    again.save_pretrained(tmp_path / "again")
    assert layer_overrides(tmp_path / "again") is None


def test_stock_runs_an_exported_checkpoint_dense(
    stock: Any, model: Any, batch: Batch, tmp_path: Path
) -> None:
    fastskip.set_policy(model, ALL_TOKENS)
    model.save_pretrained(tmp_path, export_per_layer_config=True)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(stock, batch))


@pytest.mark.parametrize(
    "unsayable",
    [
        SOME_TOKENS,
        policy(arrangements=[{"layers": [1], "kind": "parallel"}]),
        policy(arrangements=[{"layers": [[1, 2]], "kind": "pair"}]),
    ],
    ids=["some tokens", "parallel", "pair"],
)
def test_what_per_layer_config_cannot_say(
    model: Any, unsayable: dict[str, Any], tmp_path: Path
) -> None:
    fastskip.set_policy(model, unsayable)
    with pytest.raises(fastskip.PolicyError, match="export_per_layer_config"):
        model.save_pretrained(tmp_path / "export", export_per_layer_config=True)
    assert not (tmp_path / "export").exists()


def test_unknown_skips_in_a_config_raise(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / POLICY_FILE).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["per_layer_config"] = {"1": {"skip": ["convolution"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(fastskip.PolicyError, match="convolution"):
        fastskip.load_model(tmp_path)
