"""Sparse linears against dense ones, within what rounding explains; gradients; state dicts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastskip.sparse import SparseError, SparseLinear, Weights, compress_, expand_
from fastskip.sparse.convert import convert_, sparse_matrices
from fastskip.sparse.linear import BitmapLinear, CsrLinear
from fastskip.sparse.matrices import matrices
from fastskip.sparse.structured import is_two_of_four, semi_structured_
from fastskip.study.pruning import Recipe, prune_
from tests.batches import random_batch
from tests.budget import assert_within_budget, truth_copy
from tests.models import tiny_llama, tiny_llava, tiny_opt
from tests.sparse.matrices import with_zeros

SHAPES = ((1, 1), (7, 33), (48, 64), (5, 130))
SHARES = (0.0, 0.5, 0.7, 1.0)


def linear_of(rows: int, columns: int, share: float, *, bias: bool, dtype: torch.dtype) -> Any:
    made = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    made.weight.copy_(with_zeros(rows, columns, share))
    return made.to(dtype)


def held(linear: Any, form: Weights) -> SparseLinear:
    made = BitmapLinear.of(linear)
    return CsrLinear.from_bitmap(made) if form is Weights.CSR else made


FORMS = [
    (Weights.BITMAP, torch.float32),
    (Weights.BITMAP, torch.bfloat16),
    (Weights.CSR, torch.float32),
]


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_dense_product(
    form: Weights, dtype: torch.dtype, share: float, shape: tuple[int, int], bias: bool
) -> None:
    dense = linear_of(*shape, share, bias=bias, dtype=dtype)
    sparse = held(dense, form)
    for count in (1, 3, 17):
        x64 = torch.randn(count, shape[1], dtype=dtype).double()
        truth = F.linear(x64, dense.weight.double(), None if not bias else dense.bias.double())
        x = x64.to(dtype)
        assert_within_budget(f"{form}, {count} rows", sparse(x), dense(x), truth)
    batch = torch.randn(2, 3, shape[1], dtype=dtype)
    assert sparse(batch).shape == dense(batch).shape
    assert sparse(batch[:, :0]).shape == (2, 0, shape[0])


@pytest.mark.parametrize("form", [Weights.BITMAP, Weights.CSR])
def test_becomes_the_same_linear_again(form: Weights) -> None:
    dense = linear_of(9, 40, 0.6, bias=True, dtype=torch.float32)
    again = held(dense, form).to_linear()
    assert type(again) is nn.Linear
    assert torch.equal(again.weight, dense.weight) and torch.equal(again.bias, dense.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compressed_rows_may_be_cast(dtype: torch.dtype) -> None:
    """torch's sparse product takes no halves; the answer is that of the weight expanded."""
    dense = linear_of(9, 40, 0.6, bias=True, dtype=torch.float32)
    sparse = held(dense, Weights.CSR).to(dtype)
    for count in (1, 3):
        x = torch.randn(count, 40, dtype=dtype)
        assert torch.equal(sparse(x), dense.to(dtype)(x))


def test_compressed_rows_under_autocast() -> None:
    dense = linear_of(9, 40, 0.6, bias=True, dtype=torch.float32)
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(dense, Weights.CSR)(x), dense(x))


def test_both_forms_have_one_state_dict() -> None:
    dense = linear_of(9, 40, 0.6, bias=True, dtype=torch.float32)
    bitmap, csr = (held(dense, form).state_dict() for form in (Weights.BITMAP, Weights.CSR))
    assert bitmap.keys() == csr.keys() == {"bitmap", "values", "bias"}
    assert all(torch.equal(value, csr[name]) for name, value in bitmap.items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [Weights.BITMAP, Weights.CSR])
def test_loads_its_state_dict(form: Weights, bias: bool, assign: bool) -> None:
    dense, other = (linear_of(9, 40, 0.6, bias=bias, dtype=torch.float32) for _ in range(2))
    sparse, x = held(other, form), torch.randn(2, 40)
    sparse(x)
    sparse.load_state_dict(sparse.state_dict(), assign=assign)
    assert torch.equal(sparse.to_linear().weight, other.weight)
    sparse.load_state_dict(held(dense, form).state_dict(), assign=assign)
    assert torch.equal(sparse.to_linear().weight, dense.weight)
    assert torch.equal(sparse(x), held(dense, form)(x))
    state = sparse.state_dict()
    with pytest.raises(RuntimeError, match="Missing key.*bitmap"):
        sparse.load_state_dict({name: state[name] for name in state if name != "bitmap"})


@pytest.mark.parametrize("form", [Weights.BITMAP, Weights.CSR])
def test_gradients_reach_the_input(form: Weights) -> None:
    dense = linear_of(9, 40, 0.6, bias=True, dtype=torch.float32)
    sparse = held(dense, form)
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    (found,) = torch.autograd.grad(sparse(x).square().sum(), x)
    assert torch.equal(found, expected)
    assert not any(parameter.requires_grad for parameter in sparse.parameters())


@pytest.mark.parametrize("form", [Weights.BITMAP, Weights.CSR])
def test_copies(form: Weights) -> None:
    sparse = held(linear_of(9, 40, 0.6, bias=True, dtype=torch.float32), form)
    x = torch.randn(2, 40)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), sparse(x))
    double = copy.deepcopy(sparse).double()
    assert double(x.double()).dtype == torch.float64


@pytest.mark.parametrize("form", [Weights.BITMAP, Weights.CSR])
@pytest.mark.parametrize("build", [tiny_llava, tiny_llama, tiny_opt])
@torch.no_grad()
def test_a_sparse_model_is_the_dense_one(form: Weights, build: Any) -> None:
    model = build()
    prune_(model, Recipe("magnitude", 0.7))
    inputs = random_batch(model, images=(1, 1) if build is tiny_llava else (0, 0)).inputs()
    rows = inputs["attention_mask"].bool()
    eager, truth = model(**inputs).logits, truth_copy(model)(**inputs).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compress_(model, form)
    every = [matrix.name for matrix in matrices(model)]
    assert list(found.names) == every == [matrix.name for matrix in sparse_matrices(model)]
    assert found.sparse_bytes < found.dense_bytes
    assert_within_budget(str(form), model(**inputs).logits, eager, truth, rows=rows)
    expand_(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_forms_change_in_place() -> None:
    model = tiny_llama()
    prune_(model, Recipe("magnitude", 0.7))
    before = {matrix.name: matrix.weight.detach().clone() for matrix in matrices(model)}
    for form in (Weights.CSR, Weights.BITMAP, Weights.CSR):
        convert_(model, form)
        kind = CsrLinear if form is Weights.CSR else BitmapLinear
        assert all(type(matrix.module) is kind for matrix in matrices(model))
    convert_(model, "dense")
    assert all(torch.equal(matrix.weight, before[matrix.name]) for matrix in matrices(model))


def test_only_what_pays_is_compressed() -> None:
    model = tiny_llama()
    prune_(model, Recipe("magnitude", 0.5, part="ffn", layers=[1]))
    assert compress_(model).names == tuple(
        f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    )
    with pytest.raises(SparseError, match="no projection has enough zeros; allowed: a pruned"):
        compress_(tiny_llama())


def test_forms_that_there_are_not() -> None:
    model = tiny_llama()
    prune_(model, Recipe("magnitude", 0.5))
    with pytest.raises(SparseError, match="form: 'coo'; allowed: bitmap, csr"):
        compress_(model, "coo")
    with pytest.raises(SparseError, match="'csr' of bfloat16 on cpu; allowed: 'csr' of float32"):
        compress_(model.bfloat16(), "csr")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(
        SparseError, match=r"mlp\.up_proj: a peft\..*Linear; allowed: plain linears"
    ):
        compress_(wrapped)
    assert not sparse_matrices(wrapped)
    compress_(wrapped.merge_and_unload())


def test_two_of_four_is_recognised() -> None:
    assert is_two_of_four(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0, 3, 2], [0, 0, 0, 0]]))
    assert not is_two_of_four(torch.zeros(2, 6))
    for pattern, is_so in (("2:4", True), ("1:4", True), ("4:8", False)):
        model = tiny_llama()
        prune_(model, Recipe("magnitude", pattern=pattern))
        assert all(is_two_of_four(matrix.weight) == is_so for matrix in matrices(model))


def test_semi_structured_says_what_it_needs() -> None:
    model = tiny_llama()
    with pytest.raises(SparseError, match="no projection is 2:4; allowed: a model pruned to 2:4"):
        semi_structured_(model)
    prune_(model, Recipe("magnitude", pattern="2:4"))
    with pytest.raises(SparseError, match=r"q_proj: on cpu; allowed: a CUDA device, sm_80"):
        semi_structured_(model)
    assert all(type(matrix.weight) is nn.Parameter for matrix in matrices(model))
    compress_(model)
    with pytest.raises(SparseError, match=r"q_proj: on cpu"):
        convert_(model, "2:4")


@pytest.mark.gpu
@torch.no_grad()
def test_semi_structured_products() -> None:
    model = tiny_llama(hidden=128, head_dim=32, kv_heads=4, ffn=256).bfloat16().cuda()
    prune_(model, Recipe("magnitude", pattern="2:4"))
    inputs = random_batch(model, images=(0, 0)).inputs("cuda")
    rows = inputs["attention_mask"].bool()
    eager, truth = model(**inputs).logits, truth_copy(model)(**inputs).logits
    assert len(semi_structured_(model)) == 28
    assert_within_budget("2:4", model(**inputs).logits, eager, truth, rows=rows)
