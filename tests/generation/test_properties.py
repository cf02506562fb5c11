"""Random models, random legal policies, random batches: always the masked dense computation."""

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.verification.cells import GENERATED, TEXT
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.models import tiny_llama, tiny_llava, tiny_opt
from tests.policies import CELLS, Policy, pair, parallel, policy_of, skip


@dataclass(frozen=True)
class Case:
    """One draw; tests make the tensors from it, so that a failure prints what was drawn."""

    text_only: bool
    is_opt: bool
    sizes: dict[str, Any]
    policy: Policy
    images: tuple[int, ...]
    padding: str
    extra_columns: int
    seed: int

    def trio(self) -> Trio:
        if self.text_only:
            build: Any = tiny_opt if self.is_opt else tiny_llama
        else:
            build = functools.partial(tiny_llava, "llava_opt" if self.is_opt else "llava")
        return Trio(build(seed=self.seed, **self.sizes))

    def batch(self, model: PreTrainedModel, seed: int = 0, **options: Any) -> Batch:
        drawn: dict[str, Any] = {"padding": self.padding, "extra_columns": self.extra_columns}
        return random_batch(
            model, self.seed + seed, images=self.images, text=(1, 7), **drawn | options
        )


@st.composite
def policies(draw: st.DrawFn, depth: int, text_only: bool) -> Policy:
    """Legal by construction: one rule a cell and sublayer, none inside a pair."""
    classes = ["text", "generated"] if text_only else ["image", "text", "generated"]
    rules, arrangements, layer = [], [], 0
    while layer < depth:
        kind = draw(st.sampled_from(["sequential", "sequential", "own", "shared", "pair"]))
        if kind == "pair" and layer + 1 < depth:
            combine = draw(st.sampled_from(["sum", "mean"]))
            arrangements.append(pair([[layer, layer + 1]], combine))
            layer += 2
            continue
        if kind in ("own", "shared"):
            arrangements.append(parallel([layer], kind))
        tokens = draw(st.sampled_from(["all", *classes, None]))
        for name in [tokens] if tokens == "all" else classes:
            cell = draw(st.sampled_from([None, *CELLS]))
            if cell is not None and (tokens is None or name == tokens):
                sublayers, kv = CELLS[cell]
                rules.append(skip([layer], name if name == "all" else [name], sublayers, kv=kv))
        layer += 1
    return policy_of(*rules, arrangements=tuple(arrangements))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    text_only = draw(st.booleans()) and draw(st.booleans())
    is_opt = draw(st.booleans()) and draw(st.booleans())
    heads = draw(st.sampled_from([1, 2, 4]))
    depth = draw(st.integers(1, 5))
    sizes = {
        "heads": heads,
        "depth": depth,
        "hidden": draw(st.sampled_from([16, 24])),
        "ffn": draw(st.sampled_from([12, 32])),
    }
    if not is_opt:
        sizes |= {
            "kv_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
            "head_dim": draw(st.sampled_from([4, 8])),
            "attention_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
        }
    counts = st.just(0) if text_only else st.integers(0, 2)
    return Case(
        text_only=text_only,
        is_opt=is_opt,
        sizes=sizes,
        policy=draw(policies(depth, text_only)),
        images=tuple(draw(st.lists(counts, min_size=1, max_size=3))),
        padding=draw(st.sampled_from(["left", "right"])),
        extra_columns=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 1000)),
    )


@given(cases())
def test_forward(case: Case) -> None:
    """Every real row, whatever classes the rows are said to have."""
    trio = case.trio()
    batch = case.batch(trio.plain)
    trio.check_forward(case.policy, batch)
    classes = torch.randint(1 if case.text_only else 0, 3, batch.input_ids.shape)
    trio.check_forward(case.policy, batch, classes=classes, token_classes=classes)


@given(cases())
def test_generate(case: Case) -> None:
    """With the cache and without; in a padded batch and alone."""
    trio = case.trio()
    batch = case.batch(trio.plain)
    tokens = trio.check_greedy(case.policy, batch)
    for index in range(batch.size):
        alone = generate(trio.prepared, batch.alone(index))
        assert torch.equal(alone[0], tokens[index])


@given(cases(), st.integers(1, 3))
def test_hidden_states_on_the_way_change_no_token(case: Case, new: int) -> None:
    """Outputs that send every row through the last layer must not move the row that is read."""
    trio = case.trio()
    batch = case.batch(trio.plain)
    tokens = greedy(trio.plain, case.policy, batch, new)
    out = trio.under(case.policy).generate(
        **batch.inputs(),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
    )
    assert torch.equal(out.sequences[:, batch.columns :], tokens)
    assert len(out.hidden_states) == new


def joined(first: Batch, answer: Tensor, second: Batch, code: int) -> Batch:
    """A conversation: two prompts with an answer in between, of which all but the last row were
    computed as generated (`code`)."""
    classes = torch.full_like(answer, code)
    classes[:, -1] = TEXT
    ones = torch.ones_like(answer)
    images: list[Any] = []
    places = [0, 0]
    for counts in zip(first.image_counts, second.image_counts, strict=True):
        for turn, count in enumerate(counts):
            images += (first, second)[turn].images[places[turn] : places[turn] + count]
            places[turn] += count
    return replace(
        first,
        input_ids=torch.cat([first.input_ids, answer, second.input_ids], dim=1),
        attention_mask=torch.cat([first.attention_mask, ones, second.attention_mask], dim=1),
        token_classes=torch.cat([first.token_classes, classes, second.token_classes], dim=1),
        images=tuple(images),
        image_counts=tuple(
            a + b for a, b in zip(first.image_counts, second.image_counts, strict=True)
        ),
    )


@given(cases(), st.integers(1, 3))
def test_second_turn(case: Case, new: int) -> None:
    """On a kept cache answers stay GENERATED; without one the history is TEXT."""
    trio = case.trio()
    model = trio.under(case.policy)
    first = case.batch(trio.plain)
    # Pads of the second prompt lie between the turns, or at its end.
    second = case.batch(trio.plain, seed=1, extra_columns=0)
    out = model.generate(
        **first.inputs(), max_new_tokens=new, do_sample=False, return_dict_in_generate=True
    )
    answer = out.sequences[:, first.columns :]
    for kept in (True, False):
        whole = joined(first, answer, second, GENERATED if kept else TEXT)
        with MaskedOracle(trio.plain, case.policy) as oracle:
            tokens = oracle.greedy(
                **whole.inputs(), token_classes=whole.token_classes, max_new_tokens=3
            ).tokens
        # Images whose rows are in the cache are not given again, as Hugging Face wants it.
        inputs = whole.inputs()
        if kept:
            inputs = (
                second.inputs()
                | {name: inputs[name] for name in ("input_ids", "attention_mask")}
                | {CACHE_NAME: out[CACHE_NAME]}
            )
        again = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(again[:, whole.columns :], tokens), f"kept cache: {kept}"


@given(cases())
def test_the_empty_policy_is_the_plain_model(case: Case) -> None:
    trio = case.trio()
    batch = case.batch(trio.plain, padding="left")
    inputs = batch.inputs() | {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(trio.under(policy_of()).generate(**inputs), trio.plain.generate(**inputs))


@given(cases())
def test_a_copy_and_a_swapped_policy_compute_the_same(case: Case) -> None:
    trio = case.trio()
    batch = case.batch(trio.plain)
    fresh = fastskip.apply_(copy.deepcopy(trio.plain), case.policy)
    swapped = copy.deepcopy(trio.under(case.policy))
    with torch.no_grad():
        assert torch.equal(
            fresh(**batch.inputs()).logits[batch.real],
            swapped(**batch.inputs()).logits[batch.real],
        )
