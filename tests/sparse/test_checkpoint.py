"""Sparse checkpoints: smaller files, the same numbers, and no half-read weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import fastskip
from fastskip.sparse import SparseError, compress_, save_sparse
from fastskip.sparse.checkpoint import LAYOUT_FILE, SparseLayout, read_sparse
from fastskip.sparse.convert import sparse_matrices
from fastskip.sparse.matrices import matrices
from fastskip.study.pruning import Recipe, prune_
from tests.batches import random_batch
from tests.checkpoints import answer
from tests.models import LLAVA_KINDS, tiny_llama, tiny_llava, tiny_opt

RATIO = 0.7
PREPARED = [kind for kind in LLAVA_KINDS if "opt" not in kind] + ["llama"]


def pruned(kind: str, **options: Any) -> Any:
    if kind in LLAVA_KINDS:
        model: Any = tiny_llava(kind, **options)  # type: ignore[arg-type]
    else:
        model = (tiny_llama if kind == "llama" else tiny_opt)(**options)
    prune_(model, Recipe("magnitude", RATIO))
    return model


def logits(model: Any) -> torch.Tensor:
    images = (1, 2) if hasattr(model.config, "vision_config") else (0, 0)
    inputs = random_batch(model, images=images).inputs()
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits[inputs["attention_mask"].bool()]
    return found


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PREPARED)
def test_reloads_to_the_same_numbers(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(kind, dtype=dtype)
    save_sparse(model, tmp_path / "sparse")
    model.save_pretrained(tmp_path / "dense")
    ours, again = (fastskip.load_model(tmp_path / x, impl="reference") for x in ("dense", "sparse"))
    assert type(again) is type(ours) and again.dtype == dtype
    assert isinstance(again, type(model))
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert torch.equal(logits(again), logits(ours))
    for matrix in matrices(again):  # the sparsity asked for, exactly
        zeros = int((matrix.weight == 0).sum())
        assert zeros == round(RATIO * matrix.weight.numel()), matrix.name


def test_opt_keeps_its_weights(tmp_path: Path) -> None:
    model = pruned("opt")
    save_sparse(model, tmp_path)
    layout = SparseLayout.read(tmp_path / LAYOUT_FILE)
    assert len(layout.kept) == 24
    again, found = read_sparse(type(model), str(tmp_path), layout)
    assert type(again) is type(model) and not found["missing_keys"]
    assert len(sparse_matrices(again)) == 24
    for matrix in matrices(again):
        matrix.replace(matrix.module.to_linear())
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("weights", ["bitmap", "csr"])
def test_stays_sparse_if_asked(weights: str, tmp_path: Path) -> None:
    model = pruned("llava")
    save_sparse(model, tmp_path / "sparse")
    model.save_pretrained(tmp_path / "dense")
    policy = "every_nth_block"
    expected = answer(fastskip.load_model(tmp_path / "dense", policy=policy))
    for place in ("sparse", "dense"):  # from either, what is in memory is what was asked for
        again = fastskip.load_model(tmp_path / place, policy=policy, weights=weights)
        assert len(sparse_matrices(again)) == 28
        assert answer(again) == expected
        assert "one by one" in str(fastskip.plan_of(again).table())


def test_what_is_sparse_in_memory_is_saved_sparse(tmp_path: Path) -> None:
    model = pruned("llava")
    save_sparse(model, tmp_path / "a")
    again = fastskip.load_model(tmp_path / "a", policy="every_nth_block", weights="csr")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "fastskip_policy.json").is_file()
    first, second = (load_file(tmp_path / x / "model.sparse.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    third = fastskip.load_model(tmp_path / "b")
    assert fastskip.plan_of(third).policy == fastskip.plan_of(again).policy
    assert not sparse_matrices(third)


def test_files_are_smaller_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = pruned("llava", hidden=128, head_dim=32, ffn=256)
    modules = [matrix.module for matrix in matrices(model)]
    save_sparse(model, tmp_path / "sparse", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "dense")
    assert all(a is m.module for a, m in zip(modules, matrices(model), strict=True))
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 2  # in shards
    dense = sum(matrix.weight.nbytes for matrix in matrices(model))
    saved = size_of(tmp_path / "dense") - size_of(tmp_path / "sparse")
    # fp32 at 70 %: 4 bytes a weight become 0.3 * 4 + 1 / 8.
    assert saved == pytest.approx(dense * (1 - 0.3 - 1 / 32), rel=0.02)
    again = fastskip.load_model(tmp_path / "sparse")
    assert all(
        torch.equal(a.weight, b.weight)
        for a, b in zip(matrices(again), matrices(model), strict=True)
    )


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_stock_transformers_refuses_it(auto: Any, tmp_path: Path) -> None:
    save_sparse(pruned("llava" if auto is AutoModelForImageTextToText else "llama"), tmp_path)
    with pytest.raises(OSError, match=r"no file named.*model\.safetensors"):
        auto.from_pretrained(tmp_path)


def test_a_folder_holds_one_checkpoint(tmp_path: Path) -> None:
    model = pruned("llama")
    save_sparse(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(SparseError, match="a dense and a sparse checkpoint in one folder"):
        fastskip.load_model(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(SparseError, match="a dense and a sparse checkpoint in one folder"):
        save_sparse(model, tmp_path / "b")
    assert not (tmp_path / "b" / LAYOUT_FILE).exists()
    fastskip.load_model(tmp_path / "b")


def test_too_few_zeros_to_be_worth_it(tmp_path: Path) -> None:
    with pytest.raises(SparseError, match="no projection has enough zeros"):
        save_sparse(tiny_llama(), tmp_path / "a")
    tiny_llama().save_pretrained(tmp_path / "b")
    with pytest.raises(SparseError, match="no projection has enough zeros"):
        fastskip.load_model(tmp_path / "b", weights="bitmap")
    with pytest.raises(ValueError, match="weights: 'sparse'; allowed: dense, bitmap, csr, 2:4"):
        fastskip.load_model(tmp_path / "b", weights="sparse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema_version: 2; allowed: 1"),
        (lambda d: d.pop("kept"), "kept: NoneType"),
        (lambda d: d["kept"].update({"layers.9.mlp.up_proj": 3}), r"layers\.9\.mlp\.up_proj"),
        (lambda d: d["kept"].update({"layers.0.mlp.up_proj": 9999}), r"up_proj: 9999; allowed: at"),
        (lambda d: d["kept"].update({"layers.0.mlp.up_proj": -1}), "kept: dict"),
    ],
)
def test_layouts_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    save_sparse(pruned("llama"), tmp_path)
    document = json.loads((tmp_path / LAYOUT_FILE).read_text())
    change(document)
    (tmp_path / LAYOUT_FILE).write_text(json.dumps(document))
    with pytest.raises(SparseError, match=message):
        fastskip.load_model(tmp_path)


def test_a_layout_that_disagrees_with_the_weights(tmp_path: Path) -> None:
    save_sparse(pruned("llama"), tmp_path / "a")
    for kept in (5, None):
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        document = json.loads((tmp_path / "b" / LAYOUT_FILE).read_text())
        document["kept"].pop("layers.0.mlp.up_proj")
        if kept is not None:
            document["kept"]["layers.0.mlp.up_proj"] = kept
        (tmp_path / "b" / LAYOUT_FILE).write_text(json.dumps(document))
        with pytest.raises((ValueError, RuntimeError), match="up_proj|ignore_mismatched_sizes"):
            fastskip.load_model(tmp_path / "b")


@pytest.mark.parametrize("bits", [0, 255])
def test_a_bitmap_without_its_values(bits: int, tmp_path: Path) -> None:
    save_sparse(pruned("llama"), tmp_path)
    file = tmp_path / "model.sparse.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.bitmap"].fill_(bits)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SparseError, match=r"layers\.0\.mlp\.up_proj: a bitmap of (0|1536) entries"):
        fastskip.load_model(tmp_path)


@torch.no_grad()
def test_the_device_executor_calls_sparse_modules_too() -> None:
    model = pruned("llama")
    inputs = random_batch(model, images=(0, 0)).inputs()
    plain = fastskip.apply_(copy.deepcopy(model), impl="reference")
    ours = fastskip.apply_(model, impl="torch")
    assert ours(**inputs) is not None and ours._fastskip.decoder.is_fused
    for other in (plain, ours):
        compress_(other)
    expected, found = (each(**inputs).logits for each in (plain, ours))
    assert not ours._fastskip.decoder.is_fused
    assert torch.equal(found, expected)
    assert torch.equal(
        ours.generate(**inputs, max_new_tokens=5), plain.generate(**inputs, max_new_tokens=5)
    )
