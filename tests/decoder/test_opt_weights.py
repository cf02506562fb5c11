"""OPT's weights: merged, moved, changed, hooked, on disk and in the commands."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration, OPTForCausalLM

import fastskip
from fastskip.families import text_model_of
from fastskip.policy import SkipPolicy
from tests.agreement import generate
from tests.batches import random_batch
from tests.checkpoints import VOCAB, save_checkpoint
from tests.commands.test_cli import MACHINE, succeed
from tests.merging import MOVES, assert_equal_parameters, assert_same_logits, ids, logits
from tests.models import tiny_opt
from tests.policies import MIXED, policy_of, skip


@pytest.fixture
def stock() -> Any:
    return tiny_opt()


def groups(model: Any) -> list[list[nn.Linear]]:
    attentions = [layer.self_attn for layer in text_model_of(model).layers]
    return [[each.q_proj, each.k_proj, each.v_proj] for each in attentions]


def is_merged(model: Any) -> bool:
    return all(
        before.data_ptr() + before.nbytes == after.data_ptr()
        for modules in groups(model)
        for name in ("weight", "bias")
        for before, after in zip(
            [getattr(module, name) for module in modules[:-1]],
            [getattr(module, name) for module in modules[1:]],
            strict=True,
        )
    )


def test_only_q_k_and_v_move(stock: Any) -> None:
    model = copy.deepcopy(stock)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    fastskip.apply_(model)
    assert is_merged(model) and not is_merged(stock)
    moved = {n for n, p in model.named_parameters() if p.data_ptr() != before[n]}
    assert moved and all(n.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for n in moved)
    assert_equal_parameters(model, stock)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_moved_models_are_right_and_merge_again(
    stock: Any, model: Any, move: Callable[[Any], Any]
) -> None:
    moved = move(model)
    assert type(moved) is type(model)
    assert_same_logits(moved, stock)
    assert is_merged(moved)


PARTS = [
    *("embed_positions", "final_layer_norm", "layers.1.self_attn.v_proj", "layers.1.fc1"),
    *("layers.1.self_attn.out_proj", "layers.2.fc2", "layers.1.self_attn_layer_norm"),
    "layers.2.final_layer_norm",
]


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("part", PARTS)
def test_changed_parameters_are_used(stock: Any, model: Any, part: str, name: str) -> None:
    if not hasattr(text_model_of(stock).get_submodule(part), name):
        pytest.skip("an embedding has no bias")
    before = logits(model)
    for changed in (stock, model):
        module = text_model_of(changed).get_submodule(part)
        setattr(module, name, nn.Parameter(getattr(module, name).detach().flip(-1)))
    assert_same_logits(model, stock)
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", [*PARTS, "layers.1.activation_fn"])
def test_hooks_are_called(stock: Any, model: Any, part: str) -> None:
    before = logits(model)
    for hooked in (stock, model):
        module = text_model_of(hooked).get_submodule(part)
        module.register_forward_hook(lambda _m, _i, out: out * 1.5)
    assert_same_logits(model, stock)
    assert (logits(model) - before).abs().max() > 1e-3


def test_a_hook_where_nothing_calls(model: Any) -> None:
    model.model.decoder.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"layers\[1\]: a hook on a whole OPTDecoderLayer"):
        logits(model)


@pytest.mark.parametrize("tied", [True, False])
def test_text_only_checkpoint(tied: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "stock", "opt", tied=tied)
    names = load_file(tmp_path / "stock" / "model.safetensors").keys()
    assert "model.decoder.layers.0.fc1.bias" in names and ("lm_head.weight" in names) != tied
    model = fastskip.load_model(tmp_path / "stock", skip_policy())
    assert isinstance(model, OPTForCausalLM)
    model.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == names
    again = fastskip.load_model(tmp_path / "ours")
    assert fastskip.plan_of(again).policy == skip_policy()
    assert torch.equal(logits(again), logits(model))
    stock = OPTForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same_logits(fastskip.set_policy(again, "dense"), stock)
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def test_names_without_the_outer_model(tmp_path: Path) -> None:
    """As the first checkpoints of the family have them."""
    save_checkpoint(tmp_path, "opt", tied=True)
    expected = logits(fastskip.load_model(tmp_path))
    file = tmp_path / "model.safetensors"
    state = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(logits(fastskip.load_model(tmp_path)), expected)


def test_llava_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "stock", "llava_opt")
    model = fastskip.load_model(tmp_path / "stock", MIXED["each class its own rule"])
    assert isinstance(model, LlavaForConditionalGeneration)
    model.save_pretrained(tmp_path / "ours")
    batch = random_batch(model, images=(1, 0))
    again = fastskip.load_model(tmp_path / "ours")
    assert torch.equal(generate(again, batch), generate(model, batch))
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    fastskip.set_policy(again, "dense")
    assert torch.equal(generate(again, batch), generate(stock, batch))
    assert model.config.get_text_config().vocab_size == VOCAB


def skip_policy() -> SkipPolicy:
    return SkipPolicy.from_dict(policy_of(skip([1], "all", "block"), skip([2], "all", "ffn")))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(impl: str, copied: Callable[[Any], Any]) -> None:
    model = fastskip.apply_(tiny_opt(), skip_policy(), impl=impl)
    given = {"input_ids": ids(), "max_new_tokens": 4, "do_sample": False}
    before = model.generate(**given)
    other = copied(model)
    assert torch.equal(other.generate(**given), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other.generate(**given), before)


@pytest.mark.parametrize("kind", ["opt", "llava_opt"])
def test_commands(kind: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, kind)
    say = ("-m", tmp_path, "-q", "what?", "--max-new-tokens", 3)
    assert succeed("generate", *say, "-p", "every_nth_block").stdout.strip()
    holds = succeed("verify", *say, "-p", "every_nth_block").stdout
    assert holds.startswith("policy every_nth_block holds") and "3 of 3" in holds
    plan = ("plan", "-m", tmp_path, "-p", "every_nth_ffn", *MACHINE, "--json")
    told = json.loads(succeed(*plan).stdout)
    assert told["dense"]["decode_bytes"] > told["with_policy"]["decode_bytes"] > 0
    policy, samples, out = (tmp_path / name for name in ("mine.json", "some.jsonl", "out.json"))
    router = {"layers": "1:3", "tokens": "all", "skip": ["ffn"], "kind": "similarity"}
    policy.write_text(json.dumps(policy_of() | {"routers": [router | {"threshold": 0.5}]}))
    samples.write_text("\n".join(json.dumps({"prompt": text}) for text in ("what is", "who")))
    given = ("--rate", 0.5, "--samples", samples, "--new-tokens", 3, "-o", out)
    succeed("calibrate", "-m", tmp_path, "-p", policy, *given)
    assert len(SkipPolicy.from_file(out).routers) == 2
