"""Policies with routers, and what it means that a routed run is right.

The decisions of a run are read back and handed to the oracle, which computes everything and masks
what they took away: so whatever a router says, the rest of the computation is checked.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastskip
from fastskip.verification.cells import GENERATED
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio
from tests.batches import Batch
from tests.budget import assert_within_budget
from tests.policies import Policy, policy_of

Decided = dict[tuple[int, str], Tensor]


def routed(*routers: dict[str, Any], rules: Iterable[Any] = (), arrangements: Any = ()) -> Policy:
    return policy_of(*rules, arrangements=tuple(arrangements)) | {"routers": list(routers)}


def random(
    layers: Any = ":", tokens: Any = "all", *skip: str, rate: float = 0.5, **fields: Any
) -> dict[str, Any]:
    head = {"layers": layers, "tokens": tokens, "skip": list(skip) or ["block"]}
    return head | {"kind": "random", "rate": rate} | fields


def similarity(
    layers: Any = ":", tokens: Any = "all", *skip: str, threshold: float, **fields: Any
) -> dict[str, Any]:
    head = {"layers": layers, "tokens": tokens, "skip": list(skip) or ["block"]}
    return head | {"kind": "similarity", "threshold": threshold} | fields


def check_forward(trio: Trio, policy: Policy, batch: Batch, **options: Any) -> Decided:
    """Logits of all real rows are those of the masked dense computation."""
    model = fastskip.set_policy(trio.prepared, policy, **options)
    with torch.no_grad(), fastskip.record_routing(model) as record:
        actual = model(**batch.inputs()).logits
    masks = record.all_skipped()
    inputs = {**batch.inputs(), "token_classes": batch.token_classes}
    eager, truth = (_expected(each, policy, masks, inputs) for each in (trio.plain, trio.exact))
    assert_within_budget("logits", actual, eager, truth, rows=batch.real)
    return masks


def check_generate(
    trio: Trio, policy: Policy, batch: Batch, new: int = 4, **options: Any
) -> tuple[Tensor, Decided]:
    """Every step's scores are those of the masked dense computation of all that came before."""
    model = fastskip.set_policy(trio.prepared, policy, **options)
    with fastskip.record_routing(model) as record:
        out = model.generate(
            **batch.inputs(),
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=None,
        )
    masks = record.all_skipped()
    tokens = out.sequences[:, batch.columns : -1]  # the last one was not fed
    inputs = batch.inputs()
    inputs["input_ids"] = torch.cat((batch.input_ids, tokens), dim=1)
    inputs["attention_mask"] = torch.cat((batch.attention_mask, torch.ones_like(tokens)), dim=1)
    if "mm_token_type_ids" in inputs:  # Hugging Face's word for images, in models with axes
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, tokens.shape[1]))
    classes = torch.cat((batch.token_classes, torch.full_like(tokens, GENERATED)), dim=1)
    eager, truth = (
        _expected(each, policy, masks, {**inputs, "token_classes": classes})
        for each in (trio.plain, trio.exact)
    )
    first = batch.columns - 1
    actual = torch.stack(out.logits, dim=1)
    assert actual.shape[1] == new
    assert_within_budget("scores", actual, eager[:, first:].float(), truth[:, first:])
    return out.sequences[:, batch.columns :], masks


@torch.no_grad()
def _expected(model: Any, policy: Policy, masks: Decided, inputs: dict[str, Any]) -> Tensor:
    with MaskedOracle(model, policy, masks) as oracle:
        return oracle.forward(**inputs)
