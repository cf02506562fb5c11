"""`semantics="reference"` against the restatement of the papers' code, prompt and decode steps."""

from itertools import product
from typing import Any

import pytest
import torch

import fastskip
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.policy import SkipPolicy
from tests.budget import assert_within_budget, truth_copy
from tests.models import tiny_llama, tiny_opt
from tests.paper.restatement import Reference

pytestmark = pytest.mark.reference

PRESETS = {
    "skip_block": "paper/skip-block",
    "skip_ffn": "paper/skip-ffn",
    "skip_attn": "paper/skip-attention",
    "parallel_attn": "paper/parallel-attention",
    "parallel_block": "paper/parallel-block",
}
# Whose rows the code's modes are for, by the words that it puts in front of them.
SCOPES = {"all": (True, True), "text": (True, False), "generated": (False, True)}
PROMPT, ANSWER = [5, 9, 17, 3, 40], [8, 21, 30]
CASES = list(product(PRESETS, SCOPES))


def build(family: str, seed: int) -> Any:
    sizes: dict[str, Any] = {"depth": 6, "hidden": 32, "heads": 4, "seed": seed}
    return tiny_opt(**sizes) if family == "opt" else tiny_llama(kv_heads=4, head_dim=8, **sizes)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(("mode", "scope"), CASES)
@torch.no_grad()
def test_prompt_and_steps(family: str, mode: str, scope: str) -> None:
    model = build(family, seed=3)
    options: dict[str, Any] = {"scope": scope, "semantics": "reference"}
    if mode == "parallel_attn":
        options["interval"] = 2
    policy = SkipPolicy.preset(PRESETS[mode], **options)
    prompt, decode = SCOPES[scope]
    exact = truth_copy(model)
    references = [
        Reference(each, mode, (2, 4) if mode != "parallel_block" else (2,), prompt, decode)
        for each in (model, exact)
    ]
    prepared = fastskip.apply_(model, policy)
    cache: Any = None
    for step, ids in enumerate([PROMPT, *([token] for token in ANSWER)]):
        eager, truth = (reference.logits(ids) for reference in references)
        codes = torch.full((1, len(ids)), 1 if step == 0 else 2)
        out = prepared(
            torch.tensor([ids]), token_classes=codes, use_cache=True, **{CACHE_NAME: cache}
        )
        cache = getattr(out, CACHE_NAME)
        assert_within_budget(f"step {step}", out.logits[0], eager, truth)
