"""The whole tiny model on the kernels, token for token: interpreted here, compiled on a GPU."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import triton
import triton.language as tl
from transformers import PreTrainedModel

from fastskip.kernels import tuning
from fastskip.kernels.launch import recording
from fastskip.ops.account import counted
from fastskip.ops.overlap import Overlap
from tests.agreement import Trio, expected, generate, greedy
from tests.batches import Batch, random_batch
from tests.budget import assert_within_budget
from tests.device.interpreted import STREAM, TENSOR, shared
from tests.models import tiny_llava
from tests.policies import MIXED, Policy, policy_of, skip
from tests.routing.routed import check_generate, random, routed, similarity

NEW = 3
POLICIES: dict[str, Policy] = {
    "dense": policy_of(),
    "every second block": policy_of(skip([0, 2], "all", "block")),
    "text only ffn": policy_of(skip(":", ["image"], "ffn")),
    **{
        name: MIXED[name]
        for name in (
            "reuse of a copy",
            "each class its own rule",
            "parallel, shared",
            "parallel, skipped branches",
            "pairs to the end",
        )
    },
}


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    """Grouped queries, biases, and sizes that are no multiples of a block."""
    return tiny_llava(
        hidden=48, ffn=72, heads=4, kv_heads=2, head_dim=16, attention_bias=True, mlp_bias=True
    )


@pytest.fixture(scope="module")
def trio(plain: PreTrainedModel) -> Trio:
    return Trio(plain, impl="triton")


@pytest.fixture(scope="module")
def batch(plain: PreTrainedModel) -> Batch:
    return random_batch(plain, 3, images=(1, 0))


@pytest.mark.parametrize("name", POLICIES)
def test_token_for_token(name: str, trio: Trio, batch: Batch) -> None:
    tokens = greedy(trio.plain, POLICIES[name], batch, NEW)
    with tuning.table(STREAM), counted() as account:
        assert torch.equal(generate(trio.under(POLICIES[name]), batch, NEW), tokens)
    assert account.by_kernel["head"][0] == NEW - 1  # every step ran on kernels


@pytest.mark.parametrize("name", ["dense", "text only ffn", "parallel, shared"])
def test_tiles_that_programs_share(name: str) -> None:
    """In prompts and in steps of more rows than four: the same tokens."""
    trio = Trio(tiny_llava(hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16), impl="triton")
    batch = random_batch(trio.plain, 3, images=(1, 0, 1, 1, 0))
    tokens = greedy(trio.plain, POLICIES[name], batch, NEW)
    with tuning.table(shared(2)), recording() as account:
        assert torch.equal(generate(trio.under(POLICIES[name]), batch, NEW), tokens)
    for kernel in ("add_terms", "linear_rows"):
        parts = [each.arguments["SPLITS"] for each in account.launches if each.name == kernel]
        assert 2 in parts, kernel


OVERLAPPED: dict[str, Policy] = {
    **{name: POLICIES[name] for name in ("dense", "each class its own rule", "parallel, shared")},
    "pairs to the end": POLICIES["pairs to the end"],
    "routed": routed(random(":", "all", rate=0.5, kv="omit")),
    "routed, entries of all": routed(random(":", "all", rate=0.5)),
    "routed by what was": routed(similarity("1:", "all", threshold=0.6, kv="omit")),
}


@pytest.mark.parametrize("name", OVERLAPPED)
def test_launches_that_overlap(
    name: str, trio: Trio, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens. Run as PTX, nothing that the launch before writes is read too early."""
    steps = trio.prepared._fastskip.steps
    monkeypatch.setattr("fastskip.generation.device_step.can_overlap", lambda device: True)
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
    monkeypatch.setattr(steps, "overlap", Overlap.READ)
    with tuning.table(STREAM), recording() as account:
        check_generate(trio, OVERLAPPED[name], batch, NEW)
    ahead = {each.name for each in account.launches if each.arguments.get("READS_AHEAD")}
    assert ahead == {"attend_step", "add_terms"}


@contextmanager
def halves(trio: Trio) -> Iterator[None]:
    steps = trio.prepared._fastskip.steps
    steps.halves = True
    try:
        yield
    finally:
        steps.halves = False


@pytest.mark.parametrize("name", ["dense", "every second block", "each class its own rule"])
def test_norms_that_updates_take_half_of(name: str, trio: Trio, batch: Batch) -> None:
    """The same tokens from as many launches."""
    tokens = greedy(trio.plain, POLICIES[name], batch, NEW)
    model, counts = trio.under(POLICIES[name]), []
    for context in (halves(trio), nullcontext()):
        with tuning.table(STREAM), recording() as account, context:
            assert torch.equal(generate(model, batch, NEW), tokens)
        counts.append(len(account.launches))
        left = [each for each in account.launches if each.arguments.get("half") is not None]
        assert bool(left) == (len(counts) == 1)
    assert counts[0] == counts[1]


def test_half_norms_that_shared_tiles_leave_and_read() -> None:
    trio = Trio(tiny_llava(hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16), impl="triton")
    batch = random_batch(trio.plain, 3, images=(1, 0, 1, 1, 0))
    tokens = greedy(trio.plain, POLICIES["dense"], batch, NEW)
    with tuning.table(shared(2)), recording() as account, halves(trio):
        assert torch.equal(generate(trio.under(POLICIES["dense"]), batch, NEW), tokens)
    for kernel in ("add_terms", "feed", "project_append"):
        own = [each.arguments for each in account.launches if each.name == kernel]
        assert 2 in [each["SPLITS"] for each in own], kernel


def test_half_norms_in_half_precision(plain: PreTrainedModel) -> None:
    """Matrix instructions: every step's scores, as near to the truth as plain code's."""
    trio = Trio(copy.deepcopy(plain).to(torch.bfloat16), impl="triton")
    with tuning.table(TENSOR), halves(trio):
        check_generate(trio, POLICIES["dense"], random_batch(trio.plain, 3, images=(1, 0)), NEW)


@pytest.mark.parametrize("name", ["dense", "each class its own rule"])
def test_logits_of_every_row(name: str, trio: Trio, batch: Batch) -> None:
    with tuning.table(STREAM):
        trio.check_forward(POLICIES[name], batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, batch: Batch, plain: PreTrainedModel) -> None:
    """Matrix instructions: every row's logits, as near to the truth as plain code's."""
    trio = Trio(copy.deepcopy(plain).to(dtype), impl="triton")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs().items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    policy = POLICIES["each class its own rule"]
    eager = expected(trio.plain, policy, token_classes=batch.token_classes, **inputs)
    truth = expected(trio.exact, policy, token_classes=batch.token_classes, **exact)
    with torch.no_grad(), tuning.table(TENSOR):
        actual = trio.under(policy)(**inputs).logits
    assert_within_budget("logits", actual, eager, truth, rows=batch.real)


def test_logits_that_a_processor_sees(trio: Trio, batch: Batch) -> None:
    """Steps that leave logits to the host say the same as those that choose by themselves."""
    model = trio.under(POLICIES["every second block"])
    with tuning.table(STREAM):
        ahead = generate(model, batch, NEW)
        assert torch.equal(generate(model, batch, NEW, renormalize_logits=True), ahead)


@pytest.fixture(scope="module")
def opt() -> Trio:
    """LayerNorm, learned positions, ReLU, biases everywhere."""
    return Trio(tiny_llava("llava_opt", hidden=48, ffn=72, heads=3), impl="triton")


@pytest.mark.parametrize(
    "name", ["each class its own rule", "parallel, shared", "pairs to the end"]
)
def test_opt_token_for_token(name: str, opt: Trio) -> None:
    batch = random_batch(opt.plain, 3, images=(1, 0))
    tokens = greedy(opt.plain, POLICIES[name], batch, NEW)
    with tuning.table(STREAM), counted() as account:
        assert torch.equal(generate(opt.under(POLICIES[name]), batch, NEW), tokens)
    assert account.by_kernel["head"][0] == account.by_kernel["embed"][0] == NEW - 1


def test_opt_in_half_precision(opt: Trio) -> None:
    half = Trio(copy.deepcopy(opt.plain).to(torch.bfloat16), impl="triton")
    batch = random_batch(opt.plain, 3, images=(1, 0))
    with tuning.table(TENSOR):
        half.check_forward(POLICIES["each class its own rule"], batch)
