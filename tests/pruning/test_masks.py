"""Masks: laws of sets, shares of overlaps, files, and weights that stay zero while training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import fastskip
from fastskip.sparse.matrices import matrices
from fastskip.study.pruning import KeptSet, PruningError, Recipe, WeightMasks, find_masks
from tests.batches import random_batch
from tests.models import tiny_llama, tiny_llava, tiny_opt

SHAPES = {"layers.0.a": (3, 5), "layers.1.b": (2, 33)}
"""Columns that fill a word, and that do not."""


@st.composite
def masks(draw: Any) -> WeightMasks:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    share = draw(st.sampled_from((0.0, 0.2, 0.5, 1.0)))
    drawn = {n: torch.rand(shape, generator=generator) < share for n, shape in SHAPES.items()}
    return WeightMasks({name: KeptSet.of(mask) for name, mask in drawn.items()}, "f")


def bools(found: WeightMasks) -> torch.Tensor:
    return torch.cat([found.kept[name].mask.flatten() for name in SHAPES])


@given(masks(), masks())
def test_operations_are_those_of_sets(a: WeightMasks, b: WeightMasks) -> None:
    x, y = bools(a), bools(b)
    assert torch.equal(bools(a & b), x & y)
    assert torch.equal(bools(a | b), x | y)
    assert torch.equal(bools(a - b), x & ~y)
    assert torch.equal(bools(~a), ~x)
    assert (a == b) == torch.equal(x, y) == (a.digest == b.digest)


@given(masks(), masks(), masks())
def test_laws(a: WeightMasks, b: WeightMasks, c: WeightMasks) -> None:
    assert ~~a == a
    assert ~(a & b) == ~a | ~b
    assert a - b == a & ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert WeightMasks.shared([a, b, c]) == a & b & c == WeightMasks.shared([c, a, b])
    total = sum(rows * columns for rows, columns in SHAPES.values())
    # Bits that fill up a word count nowhere.
    assert a.kept_share() == float(bools(a).sum()) / total
    assert a.kept_share() + (~a).kept_share() == pytest.approx(1.0, abs=1e-15)


@given(masks(), masks(), st.floats(0, 1), st.integers(0, 5))
def test_exclusion_takes_a_share_of_the_overlap(
    a: WeightMasks, b: WeightMasks, share: float, seed: int
) -> None:
    found = a.exclude(b, share, seed=seed)
    assert found == a.exclude(b, share, seed=seed)
    assert found & a == found and found - b == a - b
    for name in SHAPES:
        overlap = int((a & b).kept[name].mask.sum())
        left = int((found & b).kept[name].mask.sum())
        assert left == overlap - round(share * overlap)
    assert a.exclude(b, 1.0) == a - b and a.exclude(b, 0.0) == a


def test_exclusions_of_two_seeds_differ() -> None:
    whole = ~WeightMasks({"m": KeptSet.of(torch.zeros(8, 40, dtype=torch.bool))}, "f")
    assert whole.exclude(whole, 0.5, seed=1) != whole.exclude(whole, 0.5, seed=2)
    assert whole.exclude(whole, 0.5).kept_share() == 0.5


def test_what_cannot_be_combined() -> None:
    model = tiny_llama()
    ffn, attention = (
        find_masks(model, Recipe("magnitude", 0.5, part=part)) for part in ("ffn", "attention")
    )
    with pytest.raises(PruningError, match=r"only one of the two has layers\.0\.mlp\.down_proj"):
        _ = ffn & attention
    both = ffn.covering(attention) & attention.covering(ffn)
    assert both.kept.keys() == ffn.kept.keys() | attention.kept.keys()
    assert both.kept_share() == 0.5
    other = find_masks(tiny_llama(depth=2), Recipe("magnitude", 0.5, part="ffn"))
    with pytest.raises(PruningError, match="masks: made for different models"):
        _ = ffn | other
    with pytest.raises(PruningError, match="masks: none; allowed: one or more"):
        WeightMasks.shared([])
    with pytest.raises(PruningError, match=r"share: 1.5; allowed: a share in \[0, 1\]"):
        ffn.exclude(ffn, 1.5)


@given(found=masks())
def test_files_keep_everything(tmp_path_factory: Any, found: WeightMasks) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    found = WeightMasks(found.kept, found.fingerprint, {"method": "wanda", "of": [1, {"x": None}]})
    found.save(path)
    again = WeightMasks.load(path)
    assert again == found and again.provenance == found.provenance
    assert {name: own.shape for name, own in again.kept.items()} == SHAPES


def test_a_file_takes_a_bit_a_weight(tmp_path: Path) -> None:
    model = tiny_llava(hidden=128, head_dim=32, ffn=256)
    found = find_masks(model, Recipe("random", 0.5))
    found.save(tmp_path / "m.safetensors")
    weights = sum(matrix.weight.numel() for matrix in matrices(model))
    assert weights / 8 < (tmp_path / "m.safetensors").stat().st_size < 1.2 * weights / 8
    assert found.provenance["method"] == "random" and found.provenance["ratio"] == 0.5


def broken(change: Callable[[dict[str, Any], dict[str, str]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = {"layers.0.a": torch.zeros(2, 4, dtype=torch.uint8)}
        about = {"format": "fastskip masks", "schema_version": "1", "fingerprint": "f"}
        about |= {"columns": '{"layers.0.a": 5}', "provenance": "{}"}
        change(tensors, about)
        save_file(tensors, path, metadata=about)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "allowed: a mask file"),
        (lambda path: path.write_bytes(b"no safetensors"), "allowed: a mask file"),
        (broken(lambda t, m: m.pop("format")), "not a mask file"),
        (broken(lambda t, m: m.update(schema_version="2")), "schema_version: '2'; allowed: 1"),
        (broken(lambda t, m: m.pop("columns")), "incomplete"),
        (broken(lambda t, m: m.update(columns="{}")), "incomplete"),
        (broken(lambda t, m: m.update(provenance="3")), "provenance: 3; allowed: a JSON object"),
        (
            broken(lambda t, m: m.update(columns='{"layers.0.a": 50}')),
            r"allowed: uint8 \[rows, 8\]",
        ),
        (broken(lambda t, m: t["layers.0.a"].fill_(255)), "bits past column 5"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / "m.safetensors")
    with pytest.raises(PruningError, match=message):
        WeightMasks.load(tmp_path / "m.safetensors")
    if "bits past" in message:  # the same file is read once it is whole
        broken(lambda t, m: None)(tmp_path / "m.safetensors")
        assert WeightMasks.load(tmp_path / "m.safetensors").kept_share() == 0


def test_masks_of_another_model() -> None:
    found = find_masks(tiny_llama(), Recipe("magnitude", 0.5))
    with pytest.raises(PruningError, match=r"layers\.0\.mlp\.gate_proj: the mask has shape \[48"):
        found.apply_(tiny_llama(ffn=64))
    with pytest.raises(PruningError, match=r"layers\.0\.self_attn\.o_proj: the model has no such"):
        find_masks(tiny_llama(kv_heads=4), Recipe("magnitude", 0.5)).apply_(tiny_opt())
    with pytest.raises(PruningError, match="masks: made for another model"):
        found.apply_(tiny_llama(depth=5))
    found.check(tiny_llama(seed=3))  # shapes make a model, not values
    found.check(tiny_llava())  # the same decoder within a LLaVA


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_training_under_masks(build: Any) -> None:
    model = build()
    found = find_masks(model, Recipe("magnitude", 0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs = random_batch(model, images=(0, 0)).inputs()
    before = {matrix.name: matrix.weight.detach().clone() for matrix in matrices(model)}
    with found.held(model, optimizer):
        for _ in range(3):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for matrix in matrices(model):
                removed = ~found.kept[matrix.name].mask
                assert (matrix.weight[removed] == 0).all()
    for matrix in matrices(model):
        kept = found.kept[matrix.name].mask
        assert (matrix.weight[kept] != before[matrix.name][kept]).any(), matrix.name
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()  # no longer held
    assert any((m.weight[~found.kept[m.name].mask] != 0).any() for m in matrices(model))


@torch.no_grad()
def test_merged_weights_are_written_where_they_lie() -> None:
    stock = tiny_llava()
    found = find_masks(stock, Recipe("magnitude", 0.5))
    inputs = random_batch(stock, images=(1, 1), text=(5, 5)).inputs()
    model = fastskip.apply_(copy.deepcopy(stock), impl="reference")
    model(**inputs)
    assert all(weights.is_merged for weights in model._fastskip.decoder.weights)
    places = [matrix.weight.data_ptr() for matrix in matrices(model)]
    found.apply_(model)
    found.apply_(stock)
    assert [matrix.weight.data_ptr() for matrix in matrices(model)] == places
    merged = model(**inputs).logits
    assert all(weights.is_merged for weights in model._fastskip.decoder.weights)
    assert torch.equal(merged, fastskip.apply_(stock, impl="reference")(**inputs).logits)


def test_weights_under_lora() -> None:
    model = tiny_llama()
    found = find_masks(model, Recipe("magnitude", 0.5))
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    bases = [m.linear.weight for m in matrices(wrapped)]
    assert len(bases) == 28 and any(m.linear is not m.module for m in matrices(wrapped))
    found.apply_(wrapped)
    for matrix in matrices(wrapped):
        assert torch.equal(matrix.weight != 0, found.kept[matrix.name].mask), matrix.name


def test_not_finite_weights_go_too() -> None:
    model = tiny_llama()
    found = find_masks(model, Recipe("magnitude", 0.5))
    for matrix in matrices(model):
        matrix.weight.data[~found.kept[matrix.name].mask] = torch.nan
    found.apply_(model)
    assert all(bool(matrix.weight.isfinite().all()) for matrix in matrices(model))
