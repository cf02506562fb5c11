"""Costs against independent counts: real modules run on fewer rows, explicit masks, tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fastskip.generation.cache_name import CACHE_NAME
from fastskip.plan import ModelShape, SkipPlan, make_plan
from fastskip.plan.chances import weights_read
from fastskip.plan.costs import (
    Ceilings,
    Cost,
    CountError,
    Operation,
    cache_bytes,
    decode_cost,
    floor_seconds,
    generation_cost,
    ideal_speedup,
    prefill_cost,
)
from fastskip.plan.survivors import left
from fastskip.policy import (
    ArrangementRule,
    Group,
    Keep,
    MaskRule,
    PolicyError,
    RemovalRule,
    RouterRule,
    SkipPolicy,
    SkipRule,
    TokenClass,
)
from tests.plan.test_plan import shape, simulate, skip_plans

IMAGE, TEXT, GENERATED = TokenClass
PROMPT = (TEXT, TEXT, IMAGE, IMAGE, IMAGE, TEXT, TEXT)

KINDS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "output",
    "out_proj": "output",
    "gate_proj": "ffn",
    "up_proj": "ffn",
    "down_proj": "ffn",
    "fc1": "ffn",
    "fc2": "ffn",
    "lm_head": "lm_head",
}
"""Linear of a Hugging Face decoder -> kind of operation."""


def llama(bias: bool = False) -> tuple[LlamaForCausalLM, ModelShape]:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=bias,
        mlp_bias=bias,
        max_position_embeddings=64,
    )
    shape = ModelShape(
        depth=5,
        hidden_size=24,
        ffn_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=50,
        has_images=True,
        attention_bias=bias,
        attention_output_bias=bias,
        ffn_bias=bias,
        dtype_bytes=4,
        max_positions=64,
    )
    return LlamaForCausalLM(config).eval(), shape


def opt() -> tuple[OPTForCausalLM, ModelShape]:
    config = OPTConfig(
        vocab_size=50,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=40,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    shape = ModelShape(
        depth=5,
        hidden_size=32,
        ffn_size=40,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        vocab_size=50,
        has_images=True,
        attention_bias=True,
        attention_output_bias=True,
        ffn_bias=True,
        gated_ffn=False,
        dtype_bytes=4,
        max_positions=64,
    )
    return OPTForCausalLM(config).eval(), shape


class OnSomeRows(nn.Module):
    """A linear that runs on some rows of the sequence and leaves zeros elsewhere."""

    def __init__(self, linear: nn.Linear, rows: list[int], length: int) -> None:
        super().__init__()
        self.linear, self.rows, self.length = linear, rows, length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequences = x.reshape(-1, self.length, x.shape[-1])  # OPT flattens them
        out = x.new_zeros(*sequences.shape[:-1], self.linear.out_features)
        if self.rows:
            out[:, self.rows] = self.linear(sequences[:, self.rows])
        return out.view(*x.shape[:-1], -1)


def really_skip(
    model: nn.Module, plan: SkipPlan, classes: Sequence[TokenClass], wanted: int
) -> None:
    """Let every linear of a Hugging Face decoder run on the rows of design section 4 only."""
    layers = next(m for n, m in model.named_modules() if n.endswith("layers"))
    assert isinstance(layers, nn.ModuleList)
    wanted_rows = range(len(classes) - wanted, len(classes))
    for layer, cells in zip(layers, plan.layers, strict=True):
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            leaf = name.rpartition(".")[2]
            rows = []
            for row, token_class in enumerate(classes):
                cell = cells.cells[token_class]
                last = cells.index in plan.steps[-1] and row not in wanted_rows
                if leaf in ("k_proj", "v_proj"):
                    runs = cell.attention or (cell.kv is not None and cell.kv.value == "project")
                elif KINDS[leaf] == "ffn":
                    runs = cell.ffn and not last
                else:
                    runs = cell.attention and not last
                rows += [row] if runs else []
            layer.set_submodule(name, OnSomeRows(linear, rows, len(classes)))


def linear_flops(model: nn.Module, batch: int, length: int, wanted: int) -> dict[str, int]:
    """FLOPs of the linears that a forward runs, by kind, as torch counts them."""
    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=wanted)
    flops = dict.fromkeys(set(KINDS.values()), 0)
    for name, counts in counter.get_flop_counts().items():
        if (leaf := name.rpartition(".")[2]) in KINDS:
            flops[KINDS[leaf]] += sum(counts.values())
    return flops


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the weights and biases of all linears that run on some row."""
    skipped = [m for m in model.modules() if isinstance(m, OnSomeRows) and not m.rows]
    left_out = {id(m.linear) for m in skipped}
    used = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in left_out]
    return sum(p.numel() * p.element_size() for m in used for p in m.parameters())


POLICIES = {
    "dense": SkipPolicy(),
    "blocks": SkipPolicy((SkipRule([1, 3], skip="block"),)),
    "ffn": SkipPolicy((SkipRule([1, 4], skip="ffn"),)),
    "frozen image": SkipPolicy((SkipRule("1:", "image", "block"),)),
    "withdrawn image": SkipPolicy((SkipRule("2:", "image", "block", "omit"),)),
    "reused text": SkipPolicy((SkipRule("2:", "text", "attention", "reuse"),)),
    "parallel": SkipPolicy(
        (SkipRule([2], "image", "ffn"),), (ArrangementRule(":", "parallel", norm="shared"),)
    ),
    "last pair": SkipPolicy(arrangements=(ArrangementRule([[3, 4]], "pair"),)),
}


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(bias=True), opt], ids=["llama", "bias", "opt"]
)
@pytest.mark.parametrize("wanted", [1, len(PROMPT)])
@pytest.mark.parametrize("name", POLICIES)
def test_linears_are_those_of_a_model_that_really_skips(make: Any, wanted: int, name: str) -> None:
    model, shape = make()
    plan = make_plan(POLICIES[name], shape)
    really_skip(model, plan, PROMPT, wanted)
    cost = prefill_cost(plan, PROMPT, batch=2, wanted=wanted)
    counted = linear_flops(model, 2, len(PROMPT), wanted)
    assert {k: n for k, n in cost.flops_by_kind.items() if k != "scores"} == counted
    assert cost.weight_bytes == linear_bytes(model)


@given(
    skip_plans(), st.lists(st.sampled_from(TokenClass), min_size=1, max_size=6), st.integers(1, 6)
)
def test_linears_of_drawn_policies(drawn: SkipPlan, classes: list[TokenClass], wanted: int) -> None:
    model, shape = llama()
    plan = make_plan(drawn.policy, shape)
    wanted = min(wanted, len(classes))
    really_skip(model, plan, classes, wanted)
    cost = prefill_cost(plan, classes, wanted=wanted)
    counted = linear_flops(model, 1, len(classes), wanted)
    assert {k: n for k, n in cost.flops_by_kind.items() if k != "scores"} == counted
    assert cost.weight_bytes == linear_bytes(model)


@pytest.mark.parametrize("name", POLICIES)
def test_decode_linears(name: str) -> None:
    model, shape = llama()
    plan = make_plan(POLICIES[name], shape)
    really_skip(model, plan, [GENERATED], 1)
    cost = decode_cost(plan, {IMAGE: 3, TEXT: 4}, batch=2, steps=3)
    one = linear_flops(model, 2, 1, 1)
    expected = {kind: 3 * flops for kind, flops in one.items()}
    assert {k: n for k, n in cost.flops_by_kind.items() if k != "scores"} == expected
    assert cost.weight_bytes == 3 * linear_bytes(model)


def masks(plan: SkipPlan, classes: Sequence[TokenClass], wanted: int) -> list[torch.Tensor]:
    """Per layer, [row, entry]: the row runs attention and sees the entry."""
    held = simulate(plan)
    length = len(classes)
    result = []
    for index, layer in enumerate(plan.layers):
        mask = torch.zeros(length, length, dtype=torch.bool)
        for row, token_class in enumerate(classes):
            late = index == plan.shape.depth - 1 and row < length - wanted
            if layer.cells[token_class].attention and not late:
                for entry in range(row + 1):
                    mask[row, entry] = classes[entry] in held[index]
        result.append(mask)
    return result


some_classes = st.lists(st.sampled_from([IMAGE, TEXT]), min_size=1, max_size=8)


@given(skip_plans(), some_classes, st.integers(1, 3), st.integers(1, 8))
def test_scores_and_kv_of_prefill(
    plan: SkipPlan, classes: list[TokenClass], batch: int, wanted: int
) -> None:
    shape, held = plan.shape, simulate(plan)
    wanted = min(wanted, len(classes))
    cost = prefill_cost(plan, classes, batch, wanted=wanted)
    seen = masks(plan, classes, wanted)
    pairs = sum(int(mask.sum()) for mask in seen)
    assert cost.flops_by_kind["scores"] == batch * pairs * 2 * 2 * shape.num_heads * shape.head_dim
    entries = [sum(c in layer for c in classes) for layer in held]
    copied = [
        sum(c in layer and layer[c] != index for c in classes) for index, layer in enumerate(held)
    ]
    read = sum(int(mask.any(0).sum()) for mask in seen)
    size = torch.empty(2, shape.num_kv_heads, shape.head_dim, dtype=torch.float16).nbytes
    assert cost.kv_written_bytes == batch * size * sum(entries)
    assert cost.kv_read_bytes == batch * size * (read + sum(copied))
    n_image, n_text = classes.count(IMAGE), classes.count(TEXT)
    assert plan.kv_bytes(n_image, n_text, batch=batch) == batch * size * sum(entries)


def test_entries_that_a_mask_parts_are_all_read() -> None:
    shape = replace(llama()[1], depth=1)
    plan = make_plan(SkipPolicy(masks=(MaskRule(":", "unimodal"),)), shape)
    size = shape.kv_entry_bytes

    def read(classes: list[TokenClass], wanted: int) -> int:
        return prefill_cost(plan, classes, 2, wanted=wanted).kv_read_bytes

    # Image rows read what they hold, text rows the rest.
    assert read([TEXT, IMAGE, IMAGE, TEXT], 4) == 2 * size * 4
    assert read([TEXT, IMAGE, IMAGE, TEXT], 1) == 2 * size * 2
    assert decode_cost(plan, {IMAGE: 5, TEXT: 2}).kv_read_bytes == size * 3


@given(skip_plans(), some_classes, st.integers(0, 4), st.integers(1, 3))
def test_decode_steps_see_the_growing_context(
    plan: SkipPlan, classes: list[TokenClass], steps: int, batch: int
) -> None:
    shape = plan.shape
    context = {c: classes.count(c) for c in set(classes)}
    cost = decode_cost(plan, context, batch, steps=steps)
    whole = [*classes, *[GENERATED] * steps]
    pairs = sum(int(mask[len(classes) :].sum()) for mask in masks(plan, whole, len(whole)))
    assert cost.flops_by_kind["scores"] == batch * pairs * 4 * shape.num_heads * shape.head_dim
    grown = plan.kv_bytes(classes.count(IMAGE), classes.count(TEXT), steps, batch)
    assert grown - plan.kv_bytes(classes.count(IMAGE), classes.count(TEXT), 0, batch) == (
        cost.kv_written_bytes
    )
    one_by_one = [decode_cost(plan, context | {GENERATED: step}, batch) for step in range(steps)]
    assert cost.flops == sum(one.flops for one in one_by_one)
    assert cost.bytes == sum(one.bytes for one in one_by_one)
    assert all(one.bytes == plan.decode_bytes(context, batch) for one in one_by_one[:1])
    machine = Ceilings(1e9, 1e10)
    apart = sum(floor_seconds(one, machine) for one in one_by_one)
    assert floor_seconds(cost, machine) == pytest.approx(apart)


@given(skip_plans(), some_classes, some_classes)
def test_prefill_in_two_turns_adds_up(
    plan: SkipPlan, first: list[TokenClass], second: list[TokenClass]
) -> None:
    """With logits for every row, a kept cache changes no FLOP of decoder rows."""
    whole = prefill_cost(plan, first + second, wanted=len(first) + len(second))
    past = {c: first.count(c) for c in set(first)}
    parts = (
        prefill_cost(plan, first, wanted=len(first)),
        prefill_cost(plan, second, wanted=len(second), past=past),
    )
    assert whole.flops == sum(part.flops for part in parts)
    assert whole.kv_written_bytes == sum(part.kv_written_bytes for part in parts)


def test_kv_bytes_are_those_of_a_real_cache() -> None:
    model, shape = llama()
    cache = model(input_ids=torch.zeros(3, 7, dtype=torch.long), use_cache=True)[CACHE_NAME]
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert make_plan(SkipPolicy(), shape).kv_bytes(2, 4, 1, batch=3) == nbytes


def test_generation_is_prefill_and_one_step_less_than_new_tokens() -> None:
    plan = make_plan(POLICIES["frozen image"], llama()[1])
    cost = plan.cost(3, 4, 5, 2, text_before=2)
    assert cost.prefill == prefill_cost(plan, PROMPT, 2)
    assert cost.decode == decode_cost(plan, {IMAGE: 3, TEXT: 4}, 2, steps=4)
    assert plan.flops(3, 4, 5, 2, text_before=2) == cost.flops
    assert plan.cost(3, 4, 1).decode.flops == 0
    assert plan.cost(3, 4, 5).prefill == prefill_cost(plan, [IMAGE] * 3 + [TEXT] * 4)


def test_batch_shares_the_weights() -> None:
    plan = make_plan(SkipPolicy(), llama()[1])
    one, four = (decode_cost(plan, {TEXT: 9}, batch) for batch in (1, 4))
    assert four.weight_bytes == one.weight_bytes
    assert four.kv_read_bytes == 4 * one.kv_read_bytes
    assert four.flops == 4 * one.flops


def test_operations_of_a_step() -> None:
    dense = make_plan(SkipPolicy(), llama()[1])
    assert decode_cost(dense, {TEXT: 9}, steps=6).operations == 5 * 5 + 1
    frozen = make_plan(POLICIES["frozen image"], llama()[1])
    # In four layers K and V run on more rows than Q; the last dense one only splits at its end.
    assert prefill_cost(frozen, PROMPT).operations == 5 * 5 + 4 + 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((-1, 4, 5), "n_image: got -1; allowed: an integer >= 0"),
        ((3, 4, 0), "n_new: got 0; allowed: an integer >= 1"),
        ((3, -1, 1), "n_text: got -1"),
        ((3, 4, 1.5), "n_new: got 1.5"),
        ((3, 4, 1, 0), "batch: got 0; allowed: an integer >= 1"),
        ((3, 4, 1, -1), "batch: got -1"),
    ],
)
def test_impossible_counts(counts: Any, message: str) -> None:
    with pytest.raises(CountError, match=message):
        make_plan(SkipPolicy(), llama()[1]).cost(*counts)


def test_impossible_counts_of_parts() -> None:
    plan = make_plan(SkipPolicy(), llama()[1])
    with pytest.raises(CountError, match="batch: got -1"):
        plan.kv_bytes(3, 4, batch=-1)
    with pytest.raises(CountError, match="batch: got 0"):
        plan.decode_bytes({TEXT: 4}, 0)
    with pytest.raises(CountError, match=r"text_before: got 5; allowed: at most n_text \(4\)"):
        plan.cost(3, 4, 1, text_before=5)


def test_text_only_model_has_no_image_rows() -> None:
    shape = llama()[1]
    sizes = {name: getattr(shape, name) for name in shape.__slots__} | {"has_images": False}
    plan = make_plan(SkipPolicy(), ModelShape(**sizes))
    assert plan.cost(0, 4, 2).flops > 0
    with pytest.raises(CountError, match="allowed: counts >= 0 of text, generated"):
        plan.kv_bytes(1, 4)


def test_floor_takes_the_slower_ceiling_of_each_operation() -> None:
    machine = Ceilings(bandwidth_bytes_per_s=10, flops_per_s=100)
    bound_by_memory = Operation("ffn", 0, flops=100, weight_bytes=30)
    bound_by_work = Operation("scores", 0, flops=700, kv_read_bytes=10, times=2)
    assert floor_seconds(Cost((bound_by_memory, bound_by_work)), machine) == 3 + 2 * 7


LLAVA_7B = ModelShape(
    depth=32,
    hidden_size=4096,
    ffn_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    has_images=True,
    dtype_bytes=2,
    max_positions=4096,
)


def test_llava_7b_by_hand() -> None:
    """Sizes worked out on paper: 202.4 M weights a layer, 0.5 MiB of K and V a token."""
    dense = make_plan(SkipPolicy(), LLAVA_7B)
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    assert dense.kv_bytes(576, 64) == 640 * 2**19
    step = decode_cost(dense, {IMAGE: 576, TEXT: 64})
    assert step.weight_bytes == 2 * (32 * weights + 4096 * 32064)
    assert step.kv_read_bytes == 641 * 2**19
    prefill = prefill_cost(dense, [IMAGE] * 576 + [TEXT] * 64, wanted=640)
    assert prefill.flops_by_kind["ffn"] == 32 * 640 * 2 * 3 * 4096 * 11008
    machine = Ceilings(4.3e12, 790e12)
    assert floor_seconds(step, machine) == pytest.approx(3.15e-3, rel=0.005)
    half = make_plan(SkipPolicy((SkipRule("0:16", skip="block"),)), LLAVA_7B)
    ideal = ideal_speedup(dense, half, machine, n_image=576, n_text=64, n_new=8)
    assert ideal.decode == pytest.approx(1.96, rel=0.005)
    same = ideal_speedup(dense, dense, machine, n_image=576, n_text=64, n_new=1)
    assert (same.prefill, same.decode) == (1.0, 1.0)


def routed_plan(*routers: RouterRule, rules: tuple[SkipRule, ...] = ()) -> SkipPlan:
    return make_plan(SkipPolicy(rules, routers=routers), llama()[1])


def random(layers: Any, tokens: Any, skip: str, rate: float = 0.5, **fields: Any) -> RouterRule:
    return RouterRule(layers, tokens, skip, "random", rate=rate, **fields)


ROUTED = {
    "block": routed_plan(random("1:", "all", "block")),
    "omitted": routed_plan(random("1:4", "all", "attention", kv="omit")),
    "reused by the batch": routed_plan(
        random([2, 3], ["text", "generated"], "block", kv="reuse", group="batch")
    ),
    "by the sequence, beside a rule": routed_plan(
        random("1:", "all", "ffn", group="sequence"),
        random([2, 4], ["image"], "attention", kv="omit"),
        rules=(SkipRule([1, 3], "image", "attention"),),
    ),
    "similarity": routed_plan(RouterRule("2:", "all", "block", threshold=0.9, group="sequence")),
}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("load", [(3, 4, 5, 1), (0, 4, 1, 2), (3, 2, 6, 3)])
def test_expected_cost_at_its_ends(name: str, load: tuple[int, int, int, int]) -> None:
    """Every operation is that of the plan itself, or of the one in which all skip."""
    plan = ROUTED[name]
    assert generation_cost(plan.expected(0), *load) == plan.cost(*load)
    assert generation_cost(plan.expected(1), *load) == plan.when_skipping.cost(*load)
    assert generation_cost(plan.expected(0.0), *load) == plan.cost(*load)


@pytest.mark.parametrize("name", ROUTED)
def test_expected_cost_falls_with_the_rate(name: str) -> None:
    plans = [ROUTED[name].expected(tenth / 10) for tenth in range(11)]
    found = [generation_cost(plan, 3, 4, 5, 2) for plan in plans]
    for less, more in zip(found, found[1:], strict=False):
        assert less.flops > more.flops
        assert less.prefill.weight_bytes >= more.prefill.weight_bytes
        assert less.decode.weight_bytes > more.decode.weight_bytes


Run = tuple[bool, ...]


def draws(group: Group, rows: int, batch: int, rate: float) -> Iterator[tuple[float, list[Run]]]:
    """All that a router can decide about the rows of a batch: its chance, and who runs."""
    count = {Group.ROW: rows * batch, Group.SEQUENCE: batch, Group.BATCH: 1}[group]
    for runs in product((True, False), repeat=count):
        chance = (1 - rate) ** sum(runs) * rate ** (count - sum(runs))
        if group is Group.ROW:
            yield chance, [runs[s * rows : (s + 1) * rows] for s in range(batch)]
        else:
            yield chance, [(runs[s % count],) * rows for s in range(batch)]


@pytest.mark.parametrize("kv", ["project", "reuse", "omit"])
@pytest.mark.parametrize("group", Group)
def test_expected_prefill_is_the_mean_over_all_decisions(group: Group, kv: str) -> None:
    """One routed layer, three rows, two sequences: every outcome is counted by hand."""
    rows, batch, rate = 3, 2, 0.3
    plan = routed_plan(random([2], "all", "block", kv=kv, group=group))
    shape = plan.shape
    q, one_kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    d, f = shape.hidden_size, shape.ffn_size
    flops, weights, written = 0.0, 0.0, 0.0
    for chance, decided in draws(group, rows, batch, rate):
        ran = [row for runs in decided for row in runs]
        kept = [[row or kv != "omit" for row in runs] for runs in decided]
        projected = rows * batch if kv == "project" else sum(ran)
        pairs = sum(
            sum(entries[: i + 1])
            for runs, entries in zip(decided, kept, strict=True)
            for i, row in enumerate(runs)
            if row
        )
        products = sum(ran) * (2 * d * q + 3 * d * f) + projected * 2 * d * one_kv
        flops += chance * (2 * products + 4 * pairs * q)
        any_ran, any_projected = float(any(ran)), float(projected > 0)
        read = any_ran * (2 * d * q + 3 * d * f) + any_projected * 2 * d * one_kv
        weights += chance * read * shape.dtype_bytes
        written += chance * sum(map(sum, kept)) * shape.kv_entry_bytes
    cost = prefill_cost(plan.expected(rate), [TEXT] * rows, batch, wanted=rows)
    mine = Cost(tuple(op for op in cost.ops if op.layer == 2))
    assert mine.flops == pytest.approx(flops, abs=5)
    assert mine.weight_bytes == pytest.approx(weights, abs=5)
    assert mine.kv_written_bytes == pytest.approx(written, abs=5)


@pytest.mark.parametrize(("group", "power"), [("row", 4), ("sequence", 4), ("batch", 1)])
def test_a_decode_step_reads_weights_unless_the_whole_batch_skips(group: str, power: int) -> None:
    plan = routed_plan(random("1:4", "all", "ffn", group=group))
    dense, skipping = (decode_cost(p, {TEXT: 4}, 4) for p in (plan, plan.when_skipping))
    step = decode_cost(plan.expected(0.7), {TEXT: 4}, 4)
    guarded = dense.weight_bytes - skipping.weight_bytes
    read = skipping.weight_bytes + guarded * (1 - 0.7**power)
    assert step.weight_bytes == pytest.approx(read, abs=6)
    work = skipping.flops + 0.3 * (dense.flops - skipping.flops)
    assert step.flops == pytest.approx(work, abs=6)
    assert weights_read(0.7, 4, Group(group)) == 1 - 0.7**power


def test_a_prompt_reads_all_weights_unless_everybody_skips() -> None:
    plan = routed_plan(random("1:", "all", "ffn"))
    prompt = [TEXT] * 40
    full, expected = (prefill_cost(p, prompt, wanted=40) for p in (plan, plan.expected(0.5)))
    assert expected.weight_bytes == full.weight_bytes
    assert prefill_cost(plan.expected(1), prompt, wanted=40).weight_bytes < full.weight_bytes


def test_capacity_lets_somebody_run() -> None:
    capped = RouterRule("1:", ["text"], "ffn", "linear", weights="w", capacity=0.25)
    plan = routed_plan(capped)
    full, expected = (prefill_cost(p, [TEXT] * 4) for p in (plan, plan.expected()))
    assert expected.weight_bytes == full.weight_bytes
    assert plan.expected() == plan.expected(0.75)


def test_rates_come_from_the_routers_unless_given() -> None:
    plan = routed_plan(random([1], "all", "ffn", 0.25), RouterRule([2], "all", "ffn", threshold=1))
    with pytest.raises(PolicyError, match=r"rate: routers\[1\] of kind 'similarity' does not say"):
        plan.expected()
    assert plan.expected({1: 0.5}) == plan.expected({0: 0.25, 1: 0.5})
    assert plan.expected(0.5) == plan.expected({0: 0.5, 1: 0.5})
    for wrong in (-0.1, 1.1, True, "half", {2: 0.5}):
        with pytest.raises(PolicyError, match="^rate: "):
            plan.expected(wrong)  # type: ignore[arg-type]


def test_expected_plans_serve_wherever_costs_take_a_plan() -> None:
    plan = ROUTED["block"]
    machine = Ceilings(1e9, 1e10)
    gains = [
        ideal_speedup(plan, other, machine, n_image=3, n_text=4, n_new=5).decode
        for other in (plan, plan.expected(0.5), plan.when_skipping)
    ]
    assert gains == sorted(set(gains)) and gains[0] == 1
    half = cache_bytes(ROUTED["omitted"].expected(0.5), {TEXT: 4})
    ends = [cache_bytes(ROUTED["omitted"].expected(rate), {TEXT: 4}) for rate in (0, 1)]
    assert half == sum(ends) / 2


def test_readme_tells_what_groups_cost() -> None:
    readme = (Path(__file__).parents[2] / "fastskip" / "routing" / "README.md").read_text()
    batches = (1, 2, 4, 8, 16)
    lines = [
        ["rows that skip", *(f"batch {batch}" for batch in batches), 'any, group "batch"'],
        ["---:"] * 7,
    ]
    for rate in (0.25, 0.5, 0.75, 0.9):
        apart = [weights_read(rate, batch) for batch in batches]
        shares = [rate, *apart, weights_read(rate, 1, Group.BATCH)]
        lines.append([f"{share:.0%}" for share in shares])
    assert "\n".join(f"| {' | '.join(line)} |" for line in lines) in readme


def test_removals_cost_what_the_rows_left_cost() -> None:
    """After a removal layers cost what they cost in a prompt without the rows that left."""
    rules = (RemovalRule(1, keep=Keep("spacing", 0.5)), RemovalRule(2, keep=Keep("spacing", 0.2)))
    removing, dense = (make_plan(SkipPolicy(removals=r), shape(5)) for r in (rules, ()))
    rows = (20, 20, 10, 2, 2)  # image rows in each layer, all before the text
    found = removing.cost(20, 6, 4, 3)
    for layer, count in enumerate(rows):
        own = dense.cost(count, 6, 4, 3)
        for phase in ("prefill", "decode"):
            expected, actual = (
                [op for op in getattr(cost, phase).ops if op.layer == layer]
                for cost in (own, found)
            )
            assert actual == expected, (phase, layer)
    each = [dense.kv_bytes(count, 6, 2, batch=3) // 5 for count in rows]
    assert removing.kv_bytes(20, 6, 2, batch=3) == sum(each)
    # several images, text between them: as many rows leave, evenly spaced
    classes = [IMAGE] * 10 + [TEXT] * 2 + [IMAGE] * 10 + [TEXT] * 4
    assert sum(classes[row] is IMAGE for row in left(rules, classes)) == 2
    assert left(rules[:1], classes)[:7] == [1, 3, 5, 7, 9, 10, 11]
