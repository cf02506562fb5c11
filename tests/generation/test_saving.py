"""A prepared model on disk: an ordinary checkpoint, and its policy beside it."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import fastskip
from fastskip import checkpoint_files
from fastskip.policy import PolicyError
from fastskip.routing.weights import LayerScore, write_weights
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
        policy(removals=[{"after_layer": 1, "keep": {"by": "random", "ratio": 0.5}}]),
    ],
    ids=["some tokens", "parallel", "pair", "removal"],
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


def routed(folder: Path, *files: str, depth: int = 4, hidden: int = 0) -> Path:
    """A policy file with one linear router a file of weights."""
    routers = []
    for number, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(len(name))
        write_weights(path, {n: LayerScore(torch.randn(hidden), 0.1) for n in range(depth)})
        at = {"layers": [number], "skip": ["ffn"], "kind": "linear"}
        routers.append(at | {"weights": name, "threshold": 0.0})
    file = folder / "policy.json"
    file.write_text(json.dumps({"schema_version": 1, "routers": routers}))
    return file


def hidden_of(stock: Any) -> int:
    size: int = stock.config.text_config.hidden_size
    return size


def test_router_weights_travel_with_the_checkpoint(
    stock: Any, model: Any, batch: Batch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    files = ("model.safetensors", "deep/scores.safetensors", "model.safetensors")
    fastskip.set_policy(model, routed(home, *files, hidden=hidden_of(stock)))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(home)
    moved = (tmp_path / "saved").rename(tmp_path / "elsewhere")
    saved = json.loads((moved / POLICY_FILE).read_text())
    names = [router["weights"] for router in saved["routers"]]
    assert names == [f"fastskip_router_{number}.safetensors" for number in (0, 1, 0)]
    again = fastskip.load_model(moved)
    assert torch.equal(logits(again, batch), expected)
    assert not torch.equal(logits(fastskip.set_policy(again, "dense"), batch), expected)


def test_router_weights_saved_where_they_came_from(
    stock: Any, model: Any, batch: Batch, tmp_path: Path
) -> None:
    """Names are given anew, so one file may take the name of another that is still needed."""
    files = ("a.safetensors", "bb.safetensors")
    fastskip.set_policy(model, routed(tmp_path / "home", *files, hidden=hidden_of(stock)))
    model.save_pretrained(tmp_path / "saved")
    again = fastskip.load_model(tmp_path / "saved")
    policy = fastskip.plan_of(again).policy
    fastskip.set_policy(again, dataclasses.replace(policy, routers=policy.routers[::-1]))
    expected = logits(again, batch)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(fastskip.load_model(tmp_path / "saved"), batch), expected)


def test_router_weights_that_are_gone_stop_saving(stock: Any, model: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    fastskip.set_policy(model, routed(home, "a.safetensors", hidden=hidden_of(stock)))
    shutil.rmtree(home)
    with pytest.raises(PolicyError, match=r"routers\[0\].weights: .*No such file"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_router_weights_are_found_among_the_links_of_the_hub_cache(
    stock: Any, model: Any, batch: Batch, tmp_path: Path
) -> None:
    """The hub's cache links each file of a checkpoint to a blob that is named by its hash."""
    fastskip.set_policy(model, routed(tmp_path / "home", "a.st", hidden=hidden_of(stock)))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for number, file in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (snapshot / file.name).symlink_to(file.rename(file.with_name(f"{number:040x}")))
    assert torch.equal(logits(fastskip.load_model(snapshot), batch), expected)


def test_router_weights_from_the_hub_come_with_the_policy(
    stock: Any, model: Any, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub whose files arrive one by one, when asked for, in a cache folder."""
    fastskip.set_policy(model, routed(tmp_path / "home", "a.st", hidden=hidden_of(stock)))
    model.save_pretrained(tmp_path / "hub")
    cache = tmp_path / "cache"
    cache.mkdir()

    def cached_file(path: str, name: str, **options: Any) -> str:
        assert path == "someone/model"
        return str(shutil.copy(tmp_path / "hub" / name, cache / name))

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    found = checkpoint_files.choose_policy(None, "someone/model", stock.config, {})
    assert sorted(file.name for file in cache.iterdir()) == [
        POLICY_FILE,
        "fastskip_router_0.safetensors",
    ]
    expected = logits(model, batch)
    assert torch.equal(logits(fastskip.set_policy(model, found), batch), expected)
    document = json.loads((tmp_path / "hub" / POLICY_FILE).read_text())
    document["routers"][0]["weights"] = "../../secret"
    (tmp_path / "hub" / POLICY_FILE).write_text(json.dumps(document))
    with pytest.raises(PolicyError, match="allowed: a file in the policy's own folder"):
        checkpoint_files.choose_policy(None, "someone/model", stock.config, {})
