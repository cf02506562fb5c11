"""Attention of prompts by flash-attn: a stand-in with its signature, since it needs a GPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.ops import flash
from tests.batches import random_batch
from tests.models import tiny_llava
from tests.policies import Policy, parallel, policy_of, skip

CALLS: list[int] = []


def packed_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """What ``flash_attn_varlen_func`` documents: ``[total, H, K]``, causal from the lower right."""
    assert causal and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    CALLS.append(len(q))
    out = torch.empty_like(q)
    lengths = []
    for start, stop, first, last in zip(
        cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False
    ):
        rows, slots = int(stop - start), int(last - first)
        lengths.append((rows, slots))
        mask = torch.ones(rows, slots, dtype=torch.bool).tril(slots - rows)
        out[start:stop] = torch.nn.functional.scaled_dot_product_attention(
            q[start:stop].transpose(0, 1),
            k[first:last].transpose(0, 1),
            v[first:last].transpose(0, 1),
            attn_mask=mask,
            scale=softmax_scale,
            enable_gqa=True,
        ).transpose(0, 1)
    assert (max_seqlen_q, max_seqlen_k) == tuple(map(max, zip(*lengths, strict=True)))
    return out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(
        "fastskip.generation.runtime.load_flash", lambda dtype, device: packed_causal
    )


POLICIES: dict[str, Policy] = {
    "dense": policy_of(),
    "text only ffn": policy_of(skip(":", ["image"], "ffn")),
    "images without entries": policy_of(skip([1, 2], ["image"], "attention", kv="omit")),
    "parallel": policy_of(arrangements=(parallel("0:3"),)),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tuple_too", [False, True])
def test_says_what_own_attention_says(
    name: str, tuple_too: bool, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tuple_too:  # some versions return the log-sum-exp beside the result
        monkeypatch.setattr(
            "fastskip.generation.runtime.load_flash",
            lambda dtype, device: lambda *a, **k: (packed_causal(*a, **k), None),
        )
    plain = tiny_llava()
    batch = random_batch(plain, 3, images=(2, 0, 1))
    own = fastskip.apply_(copy.deepcopy(plain), POLICIES[name], impl="torch")
    model = fastskip.apply_(plain, POLICIES[name], impl="torch", attention="flash")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = own.generate(**batch.inputs(), **options)
    assert torch.equal(model.generate(**batch.inputs(), **options), expected)
    assert len(CALLS) == 3  # not the last layer, where one row a sequence goes on


def test_every_layer_where_all_rows_go_on(stand_in: None) -> None:
    model = fastskip.apply_(tiny_llava(), impl="torch", attention="flash")
    batch = random_batch(model, 3, images=(2, 0, 1))
    with torch.no_grad():
        model(**batch.inputs())
    assert [int(batch.real.sum())] * 4 == CALLS


def test_policies_that_it_cannot_compute(stand_in: None) -> None:
    kept = policy_of(skip([1, 2], ["image"], "attention"))
    with pytest.raises(ValueError, match=r"attention: 'flash' cannot run layers \[1, 2\]"):
        fastskip.apply_(tiny_llava(), kept, impl="torch", attention="flash")
    model = fastskip.apply_(tiny_llava(), impl="torch", attention="flash")
    with pytest.raises(ValueError, match="attention: 'flash' cannot run layers"):
        fastskip.set_policy(model, kept)
    routed = {"layers": [2], "skip": ["block"], "kind": "random", "rate": 0.5, "kv": "omit"}
    with pytest.raises(ValueError, match=r"cannot run layers \[2\], where a router decides"):
        fastskip.set_policy(model, policy_of() | {"routers": [routed]})
    assert fastskip.plan_of(model).is_dense


def test_a_prepared_model_keeps_its_attention(stand_in: None) -> None:
    model = fastskip.apply_(tiny_llava(), impl="torch")
    with pytest.raises(ValueError, match="attention: 'flash'; allowed: None: a prepared model"):
        fastskip.apply_(model, "image_ffn", attention="flash")
    assert fastskip.plan_of(model).is_dense
    model = fastskip.apply_(tiny_llava(), impl="torch", attention="flash")
    fastskip.apply_(model, "image_ffn", attention="flash")
    assert not fastskip.plan_of(model).is_dense


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attention: 'eager'; allowed: None, 'flash'"):
        fastskip.apply_(tiny_llava(), attention="eager")
    with pytest.raises(ValueError, match="needs impl='triton'"):
        fastskip.apply_(tiny_llava(), impl="reference", attention="flash")
    with pytest.raises(ValueError, match="flash-attn needs CUDA, and bfloat16 or float16"):
        fastskip.apply_(tiny_llava(), impl="torch", attention="flash")
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs flash-attn"):
        flash.load_flash(torch.bfloat16, torch.device("cuda"))
