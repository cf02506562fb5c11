"""From a checkpoint, or a model in memory, to a prepared model; what cannot be prepared says so."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import fastskip
from fastskip import SkipPolicy, UnsupportedModelError
from fastskip.ops import Implementation, Operations, operations_of
from tests.batches import random_batch
from tests.checkpoints import VOCAB, answer, save_checkpoint
from tests.models import Kind, tiny_llama, tiny_llava


def test_it_is_the_checkpoints_own_class(checkpoint: Path, expected: list[list[int]]) -> None:
    model = fastskip.load_model(checkpoint)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not model.training
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(LlavaForConditionalGeneration, name)
    assert model.config.architectures == ["LlavaForConditionalGeneration"]
    assert answer(model) == expected


@pytest.mark.parametrize("kind", ["llava_next_vicuna", "llava_next_mistral", "llava_onevision"])
def test_other_families(kind: Kind, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, kind)
    model = fastskip.load_model(tmp_path)
    stock = type(tiny_llava(kind)).from_pretrained(tmp_path)
    assert isinstance(model, type(stock))
    assert answer(model) == answer(stock)


def test_text_only_family(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    model = fastskip.load_model(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    ids = torch.tensor([[4, 5, 6]])
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.generate(ids, max_new_tokens=6), stock.generate(ids, max_new_tokens=6))


def hub_layout(folder: Path) -> None:
    """Tensor names as in the checkpoints that the hub has today."""
    rename(folder, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))


def own_layout(folder: Path) -> None:
    """Tensor names as transformers 5 has the modules."""
    prefixes = {
        "language_model.lm_head": "lm_head",
        "language_model.model": "model.language_model",
        "vision_tower": "model.vision_tower",
        "multi_modal_projector": "model.multi_modal_projector",
    }

    def new_name(name: str) -> str:
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        return prefixes[old] + name.removeprefix(old)

    rename(folder, new_name)
    names = load_file(folder / "model.safetensors").keys()
    assert names == dict(tiny_llava(vocab=VOCAB).named_parameters()).keys()


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    file = folder / "model.safetensors"
    state = {new_name(name): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", [hub_layout, own_layout])
def test_layouts(layout: Callable[[Path], None], folder: Path, expected: list[list[int]]) -> None:
    layout(folder)
    assert answer(fastskip.load_model(folder)) == expected


def test_shards(tmp_path: Path, expected: list[list[int]]) -> None:
    save_checkpoint(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert answer(fastskip.load_model(tmp_path)) == expected


def test_pickle_is_never_read(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        fastskip.load_model(folder)
    with pytest.raises(UnsupportedModelError, match="use_safetensors"):
        fastskip.load_model(folder, use_safetensors=False)


def test_missing_weights_are_not_drawn_at_random(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["language_model.model.layers.2.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        fastskip.load_model(folder)


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(checkpoint: Path, dtype: Any, loaded: torch.dtype) -> None:
    model = fastskip.load_model(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
    assert fastskip.plan_of(model).shape.dtype_bytes == loaded.itemsize


def test_auto_is_the_checkpoints_dtype(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert fastskip.load_model(tmp_path).dtype is torch.bfloat16


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": "float99"}, ValueError, "dtype: 'float99'; allowed: auto, float32"),
    "integer dtype": ({"dtype": torch.int8}, ValueError, "dtype: torch.int8; allowed"),
    "device": ({"device": "abacus"}, ValueError, "device: 'abacus'; allowed: cpu"),
    "meta device": ({"device": "meta"}, ValueError, "device: 'meta'; allowed: cpu"),
    "impl": ({"impl": "magic"}, ValueError, "impl: 'magic'.*reference.*triton"),
    "policy": ({"policy": {"schema_version": 1, "rulez": []}}, fastskip.PolicyError, "rulez"),
    "policy that does not fit": (
        {
            "policy": {
                "schema_version": 1,
                "rules": [{"layers": [9], "tokens": "all", "skip": ["ffn"]}],
            }
        },
        fastskip.PolicyError,
        "9",
    ),
    "device_map": ({"device_map": "balanced"}, UnsupportedModelError, "'balanced'.*device="),
    "device_map in parts": (
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        UnsupportedModelError,
        "device_map: {'model': 'cpu', 'lm_head': 'disk'}.*one device",
    ),
    "device_map to disk": ({"device_map": {"": "disk"}}, UnsupportedModelError, "one device"),
    "device_map and device": (
        {"device_map": "cpu", "device": "cpu"},
        ValueError,
        "device_map: 'cpu'; allowed: None together with device='cpu'",
    ),
    "device_map of no device": ({"device_map": "abacus"}, ValueError, "'abacus'; allowed: cpu"),
    "tp_plan": ({"tp_plan": "auto"}, UnsupportedModelError, "tp_plan"),
    "attn_implementation": (
        {"attn_implementation": "eager"},
        UnsupportedModelError,
        "attn_implementation: 'eager'",
    ),
    "torch_dtype": ({"torch_dtype": "float16"}, UnsupportedModelError, "torch_dtype.*dtype"),
    "unknown": ({"polcy": {}}, TypeError, "polcy"),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys()
)
def test_bad_arguments(
    checkpoint: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastskip.load_model(checkpoint, **arguments)


@pytest.mark.parametrize(
    "placement",
    ["cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}],
    ids=str,
)
def test_a_device_map_of_one_device(checkpoint: Path, placement: Any) -> None:
    assert fastskip.load_model(checkpoint, device_map=placement).device.type == "cpu"


def test_auto_of_two_devices(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnsupportedModelError, match="device_map: 'auto'.*one device"):
        fastskip.load_model(checkpoint, device_map="auto")


def test_arguments_that_ask_for_nothing_are_allowed(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    for given in (False, None):
        model = fastskip.load_model(
            checkpoint, output_loading_info=given, quantization_config=None, device_map=None
        )
        assert answer(model) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("place", ["{folder}/absent", "./absent", "../absent", "a/b/c", ""])
def test_absent_folders_are_not_taken_for_hub_names(place: str, tmp_path: Path) -> None:
    message = "^model_id_or_path: '.*': no such folder; allowed: an existing folder, or a hub name"
    with pytest.raises(FileNotFoundError, match=message):
        fastskip.load_model(place.format(folder=tmp_path))


@pytest.mark.parametrize("place", [None, 3, b"folder", ["folder"]], ids=str)
def test_what_is_no_path_is_named(place: Any) -> None:
    message = f"^model_id_or_path: {re.escape(repr(place))}; allowed: an existing folder, or a hub"
    with pytest.raises(TypeError, match=message):
        fastskip.load_model(place)


def test_absent_device(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="device: 'cuda'; allowed: cpu"):
        fastskip.load_model(checkpoint, device="cuda")
    with pytest.raises(ValueError, match="device: 'cuda:0'; allowed: cpu"):
        fastskip.load_model(checkpoint, device_map={"": 0})
    assert fastskip.load_model(checkpoint, device_map="auto").device.type == "cpu"


BAD_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "family": ({"model_type": "aya_vision"}, {}, "model_type: 'aya_vision'.*llava_next.*llama"),
    "text model": ({}, {"model_type": "gemma"}, "text_config.model_type: 'gemma'.*llama, mistral"),
    "long RoPE": (
        {},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "rope_type: 'longrope'",
    ),
    "layers of different sizes": (
        {},
        {"per_layer_config": {"1": {"intermediate_size": 16}}},
        r"per_layer_config: \['intermediate_size'\]",
    ),
    "type of a part": (
        {"model_type": "llama"},
        {},
        "model_type: 'llama'.*supported: a multimodal type where the config has a text_config",
    ),
    "activation": ({}, {"hidden_act": "siloo"}, "text_config.hidden_act: 'siloo'.*, silu,"),
    "activation of the projector": (
        {"projector_hidden_act": "gelo"},
        {},
        "projector_hidden_act: 'gelo'.*gelu, ",
    ),
}


@pytest.mark.parametrize(("outer", "text", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_configs(
    folder: Path, outer: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config | outer))
    with pytest.raises(UnsupportedModelError, match=message):
        fastskip.load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "index.json: weight_map: None is not supported; supported: an object"),
        ("[]", r"index.json: weight_map: \[\] is"),
        ('{"weight_map": ["a"]}', r"index.json: weight_map: \['a'\] is"),
        ('{"weight_map": {}}', "index.json: metadata: None is"),
    ],
)
def test_bad_indexes(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    fastskip.load_model(folder)  # which is not read beside the whole weights
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        fastskip.load_model(folder)


def test_models_in_memory_that_cannot_be_prepared() -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(UnsupportedModelError, match="device.*meta"):
        fastskip.apply_(empty)


def test_a_model_that_is_moved_is_run_by_what_its_new_device_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The torch form stands for what a GPU would have."""
    plain = tiny_llava()
    batch = random_batch(plain, 1)
    expected = plain.generate(**batch.inputs(), max_new_tokens=3, do_sample=False)
    model = fastskip.apply_(copy.deepcopy(plain), "image_ffn")
    masks = [{"layers": ":2", "kind": "unimodal"}]
    other = fastskip.apply_(copy.deepcopy(plain), {"schema_version": 1, "masks": masks})
    runtime: Any = model._fastskip
    names: list[str | None] = []

    def resolve(impl: str | None, device: torch.device) -> Operations:
        names.append(impl)
        return operations_of(Implementation.TORCH)

    monkeypatch.setattr("fastskip.generation.runtime.resolve", resolve)
    model.generate(**batch.inputs(), max_new_tokens=3)
    assert not names
    runtime._device = torch.device("meta")  # where it lay before
    fastskip.set_policy(model, SkipPolicy())
    found = model.generate(**batch.inputs(), max_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected) and names == [None]
    assert runtime.decoder.ops.implementation is Implementation.TORCH
    # What it cannot run is refused, not run otherwise.
    other._fastskip._device = torch.device("meta")
    with pytest.raises(UnsupportedModelError, match="impl='reference'.*unimodal"):
        other.generate(**batch.inputs(), max_new_tokens=3)


def test_a_prepared_model_keeps_its_implementation() -> None:
    model = fastskip.apply_(tiny_llama(), impl="reference")
    assert fastskip.apply_(model, "every_nth_ffn", impl="reference") is model
    for other in ("torch", "bogus"):
        with pytest.raises(ValueError, match="impl: '(torch|bogus)'.*allowed"):
            fastskip.apply_(model, impl=other)


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_a_policy_that_could_not_be_asked_for_is_told(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, subfolder: str
) -> None:
    """A cache of the hub's that was filled without the policy, and no way to ask for it."""
    commit, repository = "0" * 40, tmp_path / "models--someone--model"
    shutil.copytree(checkpoint, repository / "snapshots" / commit / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)

    def load() -> list[str]:
        caplog.clear()
        options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
        options |= {"cache_dir": tmp_path, "local_files_only": True}
        fastskip.load_model("someone/model", **options)
        return [
            each.getMessage() for each in caplog.records if each.name == "fastskip.checkpoint_files"
        ]

    with caplog.at_level("WARNING", "fastskip"):
        (told,) = load()
        assert "could not be reached to check whether someone/model has one" in told
        absent = repository / ".no_exist" / commit / subfolder
        absent.mkdir(parents=True)
        (absent / "fastskip_policy.json").touch()  # as the hub's client notes it
        assert load() == []


def test_adapters_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="PeftModel.from_pretrained.*--merge"):
        fastskip.load_model(tmp_path)
