"""A step's gradients: those of autograd through the masked dense computation, however it runs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastskip
from fastskip.families import ENCODERS
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.study.training import Padding
from fastskip.study.training.batches import Collator
from fastskip.study.training.encoding import IGNORED, Encoder
from fastskip.study.training.learner import Learner
from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from fastskip.verification.oracle import MaskedOracle
from tests.budget import assert_within_budget, truth_copy
from tests.checkpoints import IMAGE_ID, VOCAB
from tests.models import LLAVA_KINDS, PAD_ID, Kind, tiny_llama, tiny_llava
from tests.policies import MIXED
from tests.training.conversations import POLICY, examples, processor, recompute

Gradients = dict[str, Tensor]
ROUTED = {
    "schema_version": 1,
    "routers": [
        {
            "layers": "1:3",
            "tokens": ["image", "text"],
            "skip": ["ffn"],
            "kind": "similarity",
            "threshold": 0.9,
        },
        {"layers": [3], "skip": ["ffn"], "kind": "random", "rate": 0.5},
    ],
}
POLICIES = {"three classes": POLICY, "routers": ROUTED, **MIXED}


def batches(kind: Kind = "llava", side: Padding = Padding.LEFT) -> list[dict[str, Tensor]]:
    encoded = [Encoder(processor(kind))(example) for example in examples(6)]
    collate = Collator(PAD_ID, side)
    return [collate(encoded[:3]), collate(encoded[3:])]


def gradients(model: Any) -> Gradients:
    """By parameter; where nothing flows, zeros."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def learned(model: Any, given: list[dict[str, Tensor]]) -> Gradients:
    """Of one optimiser step over several forwards, as the trainer takes them."""
    count = sum((batch["labels"] != IGNORED).sum() for batch in given)
    model.zero_grad()
    learner = Learner(model, None, 0.0)
    for batch in given:
        learner(**batch, num_items_in_batch=count)["loss"].backward()
    return gradients(model)


def expected(model: Any, policy: Any, given: list[dict[str, Tensor]]) -> Gradients:
    """Of the mean over all answers' tokens, each predicted from the rows before it, in which rows
    of answers are of class GENERATED."""
    count = sum((batch["labels"] != IGNORED).sum() for batch in given)
    model.zero_grad()
    for batch in given:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        classes = torch.where(inputs["input_ids"] == IMAGE_ID, IMAGE, TEXT)
        classes[labels != IGNORED] = GENERATED
        pixels = inputs["pixel_values"].to(model.dtype)
        with MaskedOracle(model, policy) as oracle:
            logits = oracle.forward(**inputs | {"pixel_values": pixels}, token_classes=classes)
        (cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="sum") / count).backward()
    return gradients(model)


def assert_alike(
    found: Gradients, eager: Gradients, truth: Gradients, *, keys_turn: bool = True
) -> None:
    """By parameter; of encoders, whose gradients come through the whole decoder, together.

    One bias for all keys moves no softmax where keys do not turn, as in most encoders: its gradient
    is rounding alone.
    """
    seeing = [name for name in found if name.split(".")[1] in ENCODERS]
    for each in found.keys() - seeing:
        if keys_turn or not each.endswith("k_proj.bias"):
            assert_within_budget(each, found[each], eager[each], truth[each])
    seeing = [name for name in seeing if not name.endswith("k_proj.bias") and truth[name].any()]
    if seeing:
        together = (
            torch.cat([of[name].flatten() / truth[name].abs().max() for name in seeing])
            for of in (found, eager, truth)
        )
        assert_within_budget("encoder", *together)


@pytest.mark.parametrize("side", list(Padding))
@pytest.mark.parametrize("name", ["three classes", *MIXED])
def test_a_step_is_that_of_the_masked_computation(name: str, side: Padding) -> None:
    plain, given = tiny_llava(vocab=VOCAB), batches(side=side)
    policy = POLICIES[name]
    eager = expected(plain, policy, given)
    truth = expected(truth_copy(plain), policy, given)
    model = fastskip.apply_(copy.deepcopy(plain), policy).train()
    found = learned(model, given)
    assert found.keys() == eager.keys() == truth.keys()
    if name not in ("no attention anywhere", "nothing at all"):
        assert found["model.multi_modal_projector.linear_1.weight"].any()
    assert_alike(found, eager, truth)


@pytest.mark.parametrize(
    "kind",
    (
        *LLAVA_KINDS,
        "llava_next_granite",
        "internvl",
        "idefics2",
        "idefics3",
        "smolvlm",
        "lighton_ocr",
        "deepseek_vl_hybrid",
        "janus",
        "qianfan_ocr",
        "ovis2",
        "fast_vlm",
        "qwen2_5_vl",
        "qwen3_vl",
    ),
)
def test_families_and_their_images(kind: Kind) -> None:
    """Several images and crops, and rows without any, in one batch."""
    plain, given = tiny_llava(kind, vocab=VOCAB), batches(kind)
    eager = expected(plain, POLICY, given)
    truth = expected(truth_copy(plain), POLICY, given)
    found = learned(fastskip.apply_(copy.deepcopy(plain), POLICY).train(), given)
    assert_alike(found, eager, truth, keys_turn=kind != "llava_opt")


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    yield seen
    handle.remove()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", POLICIES)
def test_activations_that_are_computed_again(name: str, dropout: float) -> None:
    """Checkpointing changes no gradient, not by a bit, and every layer runs twice."""
    model = fastskip.apply_(tiny_llava(vocab=VOCAB), POLICIES[name]).train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = dropout
    given, found, calls = batches(), [], []
    for wanted in (True, False):
        recompute(model, wanted=wanted)
        torch.manual_seed(0)
        with calls_of(model.model.language_model.layers[0].mlp) as seen:
            found.append(learned(model, given))
        calls.append(seen)
    light, whole = found
    assert light.keys() == whole.keys()
    for each, gradient in light.items():
        assert torch.equal(gradient, whole[each]), each
    if name != "nothing at all":
        assert sorted(calls[0]) == sorted(calls[1] * 2)


def test_checkpointing_keeps_no_cache_and_none_when_evaluating() -> None:
    model = fastskip.apply_(tiny_llama(vocab=VOCAB))
    recompute(model, wanted=True)
    ids = torch.arange(8, 20)[None]
    mlp = model.model.layers[0].mlp
    for is_training, count in ((True, 2), (False, 1)):
        model.train(is_training)
        with calls_of(mlp) as seen:
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
        assert len(seen) == count
        assert (CACHE_NAME in out) != is_training
    with torch.no_grad():  # generating from a model in training mode keeps its cache
        assert model.train().generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 14)
