"""A model three times over, and what it means that the prepared one agrees with the oracle."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import fastskip
from fastskip.verification.cells import GENERATED, TEXT
from fastskip.verification.oracle import MaskedOracle
from tests.batches import Batch
from tests.budget import assert_within_budget, truth_copy
from tests.policies import Policy


class Trio:
    """One model plain, in fp64, and prepared; the last one changes its policy from test to test."""

    def __init__(
        self,
        model: PreTrainedModel,
        impl: str | None = None,
        *,
        exact: PreTrainedModel | None = None,
        prepared: Any = None,
    ) -> None:
        """`exact`, `prepared`: where they are no copies of `model`."""
        with torch.no_grad():
            # Hugging Face's loop without a cache takes a generated placeholder for an image and
            # raises, so the reserved ids must never be the best.
            model.get_output_embeddings().weight[-2:] = 0
        self.plain, self.exact = model, truth_copy(model) if exact is None else exact
        if prepared is None:
            prepared = fastskip.apply_(copy.deepcopy(model), impl=impl)
        self.prepared = prepared

    def under(self, policy: Policy) -> Any:
        """The prepared model under `policy`."""
        return fastskip.set_policy(self.prepared, policy)

    def expected(self, policy: Policy, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The oracle's logits, plain and exact."""
        return expected(self.plain, policy, **inputs), expected(self.exact, policy, **inputs)

    def check_forward(
        self, policy: Policy, batch: Batch, *, classes: Tensor | None = None, **product_inputs: Any
    ) -> None:
        """Logits of all real rows; `product_inputs` go to the prepared model alone."""
        eager, truth = self.expected(
            policy,
            token_classes=batch.token_classes if classes is None else classes,
            **batch.inputs(),
        )
        with torch.no_grad():
            actual = self.under(policy)(**batch.inputs(), **product_inputs).logits
        assert_within_budget("logits", actual, eager, truth, rows=batch.real)

    def check_greedy(self, policy: Policy, batch: Batch, new: int = 4, **options: Any) -> Tensor:
        """Greedy tokens, with the cache and without, are the ones of computing all again."""
        tokens = greedy(self.plain, policy, batch, new)
        model = self.under(policy)
        assert torch.equal(generate(model, batch, new, **options), tokens), "with the cache"
        assert torch.equal(generate(model, batch, new, use_cache=False), tokens), "without a cache"
        return tokens


@torch.no_grad()
def expected(model: PreTrainedModel, policy: Policy, **inputs: Any) -> Tensor:
    """The oracle's logits."""
    with MaskedOracle(model, policy) as oracle:
        return oracle.forward(**inputs)


def greedy(model: PreTrainedModel, policy: Policy, batch: Batch, new: int = 4) -> Tensor:
    """The oracle's greedy tokens, [batch, new]."""
    with MaskedOracle(model, policy) as oracle:
        return oracle.greedy(**batch.inputs(), max_new_tokens=new).tokens


def generate(model: Any, batch: Batch, new: int = 4, **options: Any) -> Tensor:
    """The prepared model's greedy tokens, [batch, new]."""
    tokens: Tensor = model.generate(
        **batch.inputs(), max_new_tokens=new, do_sample=False, **options
    )
    return tokens[:, batch.columns :]


def answer_labels(batch: Batch, count: int = 3) -> tuple[Tensor, Tensor]:
    """Labels on the text rows among the last `count` real ones, and the classes that they mean."""
    rank = batch.real.flip(1).cumsum(1).flip(1)
    labelled = batch.real & (rank <= count) & (batch.token_classes == TEXT)
    labels = batch.input_ids.masked_fill(~labelled, -100)
    return labels, batch.token_classes.masked_fill(labelled, GENERATED)
