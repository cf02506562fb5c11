"""Runs models on the pretended device and prints what was seen, as JSON in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import fastskip
from fastskip.generation.prepared import PreparedDecoder
from fastskip.kernels import tuning
from fastskip.ops import bodies, compiled
from fastskip.ops.allocate import poisoned
from tests.batches import Batch, random_batch
from tests.device.interpreted import STREAM
from tests.device.pretended.device import DEVICE, pretending
from tests.device.pretended.graphs import Graph
from tests.device.pretended.log import LOG
from tests.interpreting import interpreting_quickly
from tests.models import Kind, tiny_llava
from tests.policies import Policy, policy_of, skip
from tests.removals.removing import removal, removing
from tests.routing.routed import random, routed

CALLS = range(3)
"""In the first all is launched but steps, in the second captured, in the third replayed."""
NEW = 3
Found = dict[str, Any]


class Pair:
    """A prepared model on the device, and one on the host that says what is right."""

    def __init__(
        self, kind: Kind = "llava", policy: Policy | None = None, impl: str = "triton"
    ) -> None:
        depth = 3 if kind == "qwen3_vl" else 2
        sizes: Any = {"hidden": 32, "ffn": 48, "heads": 2, "kv_heads": 1, "head_dim": 16}
        plain = tiny_llava(kind, depth=depth, **sizes)
        self.expected: Any = plain
        if policy is not None:
            self.expected = fastskip.apply_(copy.deepcopy(plain), policy, impl="reference")
        self._batch = random_batch(plain, 3, images=(1, 1), text=(2, 4))
        self._there: Any = fastskip.apply_(copy.deepcopy(plain).to(DEVICE), policy, impl=impl)

    def batch(self, number: int) -> Batch:
        """Prompts of one shape, other text and other images for each number."""
        batch = self._batch
        is_text = (batch.input_ids < 32) & batch.real
        ids = torch.where(is_text, 1 + (batch.input_ids + number) % 31, batch.input_ids)
        images = tuple((pixels + number, size) for pixels, size in batch.images)
        return dataclasses.replace(batch, input_ids=ids, images=images)

    def call(self, number: int, *, on_host: tuple[str, ...] = (), **options: Any) -> Found:
        """What ``generate`` says, and what was seen; ``on_host``: inputs that lie there."""
        here, there = (self.batch(number).inputs(device) for device in ("cpu", str(DEVICE)))
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        torch.manual_seed(number)
        expected = self.expected.generate(**here, **options)
        torch.manual_seed(number)
        before = Graph.replays
        LOG.clear()
        given = there | {name: here[name] for name in on_host}
        tokens = self._there.generate(**given, **options)
        LOG.notes_waits = False
        return {
            "tokens": tokens.cpu().tolist(),
            "expected": expected.tolist(),
            "new": tokens.shape[1] - self._batch.columns,
            "faults": [*LOG.faults],
            "waits": [*LOG.waits],
            "replays": Graph.replays - before,
            "towers": len(self._there._fastskip.tower),
        }


@cache
def llava() -> Pair:
    return Pair()


def greedy(pair: Pair) -> list[Found]:
    """With a stop token that the first sequence comes to in the last call."""
    last = pair.batch(CALLS[-1]).inputs()
    said = pair.expected.generate(**last, max_new_tokens=NEW, do_sample=False)
    return [pair.call(number, eos_token_id=int(said[0, -2])) for number in CALLS]


def of_host_ids(**options: Any) -> list[Found]:
    on_host = ("input_ids", "attention_mask")
    return [llava().call(number, on_host=on_host, **options) for number in CALLS]


def under_autocast() -> list[Found]:
    pair, found = Pair(impl="torch"), []
    for number in CALLS:
        # To torch's casts tensors of the device are the host's.
        with torch.autocast("cuda", torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            found.append(pair.call(number))
    return found


def routers() -> list[Found]:
    """Prompts by bodies for several numbers of rows, as long ones have them."""
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ((bodies, "BOUNDS"), (compiled, "FEW_CHOSEN")):
            patched.setattr(module, name, 4)
        return greedy(Pair(policy=routed(random([0, 1], "all", "block", kv="omit"))))


SKIPS = policy_of(skip([0], ["image"], "block", kv="omit"), skip([1], ["generated"], "ffn"))
RUNS: Mapping[str, Callable[[], list[Found]]] = {
    "llava": lambda: greedy(llava()),
    "host ids": lambda: of_host_ids(eos_token_id=5),
    "host ids, sampled": lambda: of_host_ids(do_sample=True),
    "llava_next": lambda: greedy(Pair("llava_next_vicuna")),
    "granite": lambda: greedy(Pair("llava_next_granite")),
    "qwen3_vl": lambda: greedy(Pair("qwen3_vl")),
    "skips": lambda: greedy(Pair(policy=SKIPS)),
    "routers": routers,
    "removals": lambda: greedy(Pair(policy=removing(removal(0, "attention")))),
    "autocast": under_autocast,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    run_decoder, found = PreparedDecoder._run, dict[str, Found]()

    def entered(decoder: Any, inputs: dict[str, Any]) -> Any:
        LOG.notes_waits = True
        return run_decoder(decoder, inputs)

    with ExitStack() as blocks:
        for block in (interpreting_quickly(), pretending(), tuning.table(STREAM), poisoned()):
            blocks.enter_context(block)
        blocks.enter_context(pytest.MonkeyPatch.context()).setattr(PreparedDecoder, "_run", entered)
        for name in names or RUNS:
            try:
                found[name] = {"calls": RUNS[name]()}
            except Exception:  # the others can be judged all the same
                found[name] = {"error": traceback.format_exc(), "faults": LOG.faults}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
