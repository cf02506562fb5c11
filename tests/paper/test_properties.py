"""Random policies of everything that only the plain runtime has: still the masked computation."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastskip
from fastskip.families import text_model_of
from fastskip.verification.exact import compute_in_double
from tests.agreement import Trio, generate
from tests.batches import random_batch
from tests.decoder.test_gradients import compare, oracle_gradients
from tests.models import tiny_llama, tiny_llava
from tests.policies import CELLS, Policy, policy_of, skip

pytestmark = pytest.mark.reference

CLASSES = ("image", "text", "generated")
HIDDEN = {"attention-hidden": ("attention", "hidden"), "block-hidden": ("block", "hidden")}
UNNAMED = {"attention": ("attention", None), "block": ("block", None), "ffn": ("ffn", None)}


@st.composite
def policies(draw: st.DrawFn, depth: int = 4) -> Policy:
    """Arrangements for some classes, hidden K and V, masks, and the reference semantics."""
    refers = draw(st.booleans())
    cells = CELLS | HIDDEN | (UNNAMED if refers else {})
    kinds = ["sequential", "shared"] if refers else ["sequential", "own", "shared"]
    kinds += [] if refers else ["pair"]
    some = st.lists(st.sampled_from(CLASSES), min_size=1, unique=True)
    rules: list[Any] = []
    arrangements: list[Any] = []
    layer = 0
    while layer < depth:
        kind = draw(st.sampled_from(kinds))
        tokens = draw(st.just("all") | some)
        if kind == "pair":
            combine = draw(st.sampled_from(["sum", "mean"]))
            if layer + 1 < depth:
                own = {"kind": "pair", "combine": combine, "tokens": tokens}
                arrangements.append({"layers": [[layer, layer + 1]], **own})
            layer += 2
            continue
        if kind in ("own", "shared"):
            own = {"kind": "parallel", "norm": kind, "tokens": tokens}
            arrangements.append({"layers": [layer], **own})
        for name in CLASSES:
            cell = draw(st.sampled_from([None, *cells]))
            if cell is not None:
                sublayers, kv = cells[cell]
                rules.append(skip([layer], [name], sublayers, kv=kv))
        layer += 1
    masked = draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=2))
    policy = policy_of(*rules, arrangements=tuple(arrangements))
    if masked:
        policy["masks"] = [{"layers": masked, "kind": "unimodal"}]
    return policy | ({"semantics": "reference"} if refers else {})


def trio_of(seed: int) -> Trio:
    return Trio(tiny_llava(heads=4, kv_heads=4, head_dim=8, hidden=32, seed=seed))


paddings = st.sampled_from(["left", "right"])


@given(policies(), st.integers(0, 100), paddings)
def test_forward(policy: Policy, seed: int, padding: Any) -> None:
    trio = trio_of(seed)
    batch = random_batch(trio.plain, seed, images=(1, 0, 2), text=(1, 6), padding=padding)
    trio.check_forward(policy, batch)
    classes = torch.randint(0, 3, batch.input_ids.shape)
    trio.check_forward(policy, batch, classes=classes, token_classes=classes)


@given(policies(), st.integers(0, 100), paddings)
def test_generate(policy: Policy, seed: int, padding: Any) -> None:
    """With the cache and without; in a padded batch and alone."""
    trio = trio_of(seed)
    batch = random_batch(trio.plain, seed, images=(1, 2), text=(1, 6), padding=padding)
    tokens = trio.check_greedy(policy, batch)
    for index in range(batch.size):
        assert torch.equal(generate(trio.prepared, batch.alone(index))[0], tokens[index])


@given(policies(), st.integers(0, 100))
def test_gradients(policy: Policy, seed: int) -> None:
    """Autograd through the runtime equals autograd through the masked dense computation."""
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 8, "hidden": 32}
    plain = tiny_llava(seed=seed, dtype=torch.float64, **sizes)
    prepared = fastskip.apply_(copy.deepcopy(plain))
    compute_in_double(text_model_of(prepared), lambda handle: None)
    batch = random_batch(plain, seed, images=(1, 1), text=(4, 6))
    compare(prepared, policy, batch, oracle_gradients(plain, policy, batch))


def test_unimodal_mask_hides_both_ways() -> None:
    """With all layers masked text never hears of the image, nor the image of the text."""
    trio = trio_of(1)
    policy = policy_of() | {"masks": [{"layers": ":", "kind": "unimodal"}]}
    model = trio.under(policy)
    batch = random_batch(trio.plain, 5, images=(1,), text=(4, 4))
    inputs = batch.inputs()
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    is_text = batch.token_classes[0] == 1
    with torch.no_grad():
        one, two = model(**inputs).logits[0], model(**other).logits[0]
    assert torch.equal(one[is_text], two[is_text])
    assert not torch.equal(one[~is_text], two[~is_text])


def test_text_only_models_know_no_images() -> None:
    trio = Trio(tiny_llama())
    batch = random_batch(trio.plain, 2, images=(0, 0), text=(3, 6))
    masked = policy_of() | {"masks": [{"layers": ":2", "kind": "unimodal"}]}
    assert torch.equal(trio.check_greedy(masked, batch), trio.check_greedy(policy_of(), batch))
    paired = [{"layers": ":", "kind": "pair", "tokens": ["text"]}]
    trio.check_greedy(policy_of(arrangements=tuple(paired)), batch)
    assert fastskip.plan_of(trio.prepared).layers[0].arranged == {"text"}
