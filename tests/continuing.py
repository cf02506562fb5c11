"""New rows after a cache, forward by forward, and what they must come to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.generation.cache_name import CACHE_NAME
from tests.agreement import Trio
from tests.batches import Batch
from tests.budget import assert_within_budget
from tests.policies import Policy, pair, policy_of, skip

CACHE_POLICIES = {
    "dense": policy_of(),
    "project": policy_of(skip("1:3", ["image"], "attention", kv="project")),
    "reuse": policy_of(skip("1:3", ["image", "generated"], "block", kv="reuse")),
    "omit": policy_of(skip("0:2", ["image"], "attention", kv="omit")),
    "omit generated": policy_of(skip([1, 2], ["generated"], "attention", kv="omit")),
    "layer 0 empty": policy_of(skip([0], "all", "attention")),
    "layers 0 and 1 empty": policy_of(skip("0:2", "all", "block", kv="reuse")),
    "mixed": policy_of(
        skip([0], "all", "attention"),
        skip([1], ["image"], "block", kv="omit"),
        skip([2], ["image", "text"], "attention", kv="reuse"),
        skip([3], ["generated"], "attention", kv="reuse"),
    ),
    "pair": policy_of(skip([0], ["image"], "attention", kv="omit"), arrangements=(pair([[2, 3]]),)),
}


def some_tokens(batch: Batch, count: int) -> Tensor:
    """New rows for every sequence; none of them a reserved id."""
    return torch.randint(1, 60, (batch.size, count), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Continued:
    """A batch of prompts under one policy, and rows that follow it.

    Codes are those of `token_classes`, one for all new rows or a tensor of their shape.
    `sequences` says which sequences of the batch a cache holds by now.
    """

    trio: Trio
    policy: Policy
    batch: Batch

    @property
    def model(self) -> Any:
        return self.trio.under(self.policy)

    @torch.no_grad()
    def fill(self) -> SkipCache:
        """The cache of the prompts."""
        outputs = self.model(**self.batch.inputs(), use_cache=True, logits_to_keep=1)
        cache = outputs[CACHE_NAME]
        assert isinstance(cache, SkipCache)
        return cache

    @torch.no_grad()
    def proceed(
        self,
        cache: SkipCache,
        tokens: Tensor,
        codes: Tensor | int,
        sequences: list[int] | slice = slice(None),
    ) -> Tensor:
        """Logits of new rows, in one forward."""
        new = cache.get_seq_length() - self.batch.columns + tokens.shape[1]
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=self.mask(new)[sequences],
            **{CACHE_NAME: cache},
            token_classes=torch.zeros_like(tokens) + codes,
        ).logits
        return logits

    def check(
        self,
        logits: Tensor,
        tokens: Tensor,
        codes: Tensor | int,
        sequences: list[int] | slice = slice(None),
    ) -> None:
        """`logits` are those of the last of the new rows, with all computed at once."""
        eager, truth = (
            each[sequences, -logits.shape[1] :]
            for each in self.trio.expected(
                self.policy,
                **self.batch.inputs()
                | {
                    "input_ids": torch.cat([self.batch.input_ids, tokens], dim=1),
                    "attention_mask": self.mask(tokens.shape[1]),
                    "token_classes": torch.cat(
                        [self.batch.token_classes, torch.zeros_like(tokens) + codes], dim=1
                    ),
                },
            )
        )
        assert_within_budget("logits of new rows", logits, eager, truth)

    def mask(self, new: int) -> Tensor:
        """The attention mask of prompts and new rows."""
        ones = torch.ones(self.batch.size, new, dtype=torch.long)
        return torch.cat([self.batch.attention_mask, ones], dim=1)
