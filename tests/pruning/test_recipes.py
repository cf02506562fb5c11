"""Recipes: exactly what was asked for is removed, or an error says what can be asked."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastskip.sparse import compress_
from fastskip.sparse.matrices import SparseError, matrices
from fastskip.study.pruning import Pattern, PruningError, Recipe, find_masks, prune_
from fastskip.study.pruning.selection import kept_by
from tests.models import tiny_llama, tiny_llava, tiny_opt

RATIOS = (0.3, 0.5, 0.7)


@st.composite
def scored(draw: Any) -> torch.Tensor:
    """A matrix of scores, few of them different, so that ties are many."""
    rows, columns = draw(st.integers(1, 6)), 8 * draw(st.integers(1, 5))
    seed, values = draw(st.integers(0, 2**20)), draw(st.sampled_from((2, 5, 1000)))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, values, (rows, columns), generator=generator).double()


@given(scored(), st.floats(0.01, 0.99), st.sampled_from(("row", "matrix")))
def test_counts_are_exact_and_the_lowest_go(scores: torch.Tensor, ratio: float, per: str) -> None:
    kept = kept_by(scores, Recipe("random", ratio, per=per))
    groups = [(scores, kept)] if per == "matrix" else list(zip(scores, kept, strict=True))
    for own, mask in groups:
        assert int((~mask).sum()) == round(ratio * own.numel())
        if mask.any() and not mask.all():
            assert own[mask].min() >= own[~mask].max()


@given(scored(), st.sampled_from(("1:2", "2:4", "1:4", "4:8")))
def test_patterns_keep_n_of_every_m(scores: torch.Tensor, pattern: str) -> None:
    kept_count, group = map(int, pattern.split(":"))
    kept = kept_by(scores, Recipe("magnitude", pattern=pattern))
    for row, mask in zip(scores, kept, strict=True):
        for own, part in zip(row.split(group), mask.split(group), strict=True):
            assert int(part.sum()) == kept_count
            assert own[part].min() >= own[~part].max()


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_models_have_the_share_of_zeros_asked_for(method: str, ratio: float, per: str) -> None:
    model = tiny_llava()
    masks = prune_(model, Recipe(method, ratio, per=per))
    for matrix in matrices(model):
        groups = matrix.weight if per == "row" else matrix.weight.view(1, -1)
        assert ((groups == 0).sum(1) == round(ratio * groups.shape[1])).all(), matrix.name
        assert torch.equal(matrix.weight != 0, masks.kept[matrix.name].mask)


def test_magnitude_is_what_its_name_says() -> None:
    model = tiny_llama()
    before = {matrix.name: matrix.weight.detach().clone() for matrix in matrices(model)}
    for name, own in find_masks(model, Recipe("magnitude", 0.6)).kept.items():
        size = before[name].abs()
        assert size[own.mask].min() >= size[~own.mask].max(), name


def test_random_is_seeded_and_seeds_differ() -> None:
    first, again, other = (
        find_masks(tiny_llama(), Recipe("random", 0.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again and first != other
    alone = find_masks(tiny_llama(), Recipe("random", 0.5, seed=1, layers=[2]))
    assert all(torch.equal(own.bitmap, first.kept[k].bitmap) for k, own in alone.kept.items())


@pytest.mark.parametrize("build", [tiny_llama, tiny_llava, tiny_opt])
def test_parts_and_layers(build: Any) -> None:
    is_opt = build is tiny_opt
    attention = {"q_proj", "k_proj", "v_proj", "out_proj" if is_opt else "o_proj"}
    ffn = {"fc1", "fc2"} if is_opt else {"gate_proj", "up_proj", "down_proj"}
    for part, expected in (("attention", attention), ("ffn", ffn), ("block", attention | ffn)):
        model = build()
        masks = prune_(model, Recipe("magnitude", 0.5, part=part, layers="1:-1"))
        names = {
            tuple(name.split(".")[1::2] if "fc" not in name else name.split(".")[1:])
            for name in masks.kept
        }
        assert names == {(layer, name) for layer in "12" for name in expected}
        for matrix in matrices(model):
            assert bool((matrix.weight == 0).any()) == (matrix.name in masks.kept), matrix.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, r"ratio: 0; allowed: a share in \(0, 1\)"),
        ({"ratio": 1.0}, r"ratio: 1.0; allowed"),
        ({"ratio": float("nan")}, r"ratio: nan; allowed"),
        ({"ratio": True}, r"ratio: True; allowed"),
        ({}, r"ratio: None; allowed"),
        ({"ratio": 0.3, "pattern": "2:4"}, r"ratio: 0.3; allowed: 0.5, or none, with 2:4"),
        ({"pattern": "4:2"}, r"pattern: '4:2'; allowed: N:M with 0 < N < M"),
        ({"pattern": "two"}, r"pattern: 'two'"),
        ({"pattern": "0:4"}, r"pattern: '0:4'; allowed: N:M with 0 < N < M"),
        ({"pattern": "2:4", "per": "row"}, r"per: 'row'; allowed: none with a pattern"),
        ({"ratio": 0.5, "method": "sparsegpt"}, r"method: 'sparsegpt'; allowed: wanda, magnitude"),
        ({"ratio": 0.5, "per": "layer"}, r"per: 'layer'; allowed: row, matrix"),
        ({"ratio": 0.5, "part": "mlp"}, r"part: 'mlp'; allowed: block, attention, ffn"),
        ({"ratio": 0.5, "layers": "a:b"}, r"layers: 'a:b'"),
        ({"ratio": 0.5, "layers": [0, 4]}, r"layers: \(0, 4\); allowed: layer indices in \[0, 4\)"),
        ({"ratio": 0.5, "seed": "a"}, r"seed: 'a'; allowed: an integer"),
        ({"ratio": 0.5, "seed": None}, r"seed: None; allowed: an integer"),
        ({"pattern": "3:5"}, r"pattern: 3:5; allowed: .* divides the 32 columns of layers.0.self"),
    ],
)
def test_errors_say_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message) as caught:
        find_masks(tiny_llama(), Recipe(**{"method": "magnitude", **arguments}))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


@pytest.mark.parametrize(("kept", "group"), [(4, 2), (4, 4), (0, 4), (-1, 4)])
def test_patterns_are_checked_however_they_are_made(kept: int, group: int) -> None:
    with pytest.raises(PruningError, match=f"pattern: '{kept}:{group}'; allowed: N:M"):
        Pattern(kept, group)


def test_sparse_weights_must_be_expanded_first() -> None:
    model = tiny_llama()
    prune_(model, Recipe("magnitude", 0.5))
    compress_(model)
    with pytest.raises(SparseError, match=r"layers\.0\.self_attn\.q_proj: held as BitmapLinear"):
        prune_(model, Recipe("magnitude", 0.7))
