"""The cases that are run: a short list by default, a long one under the `full` marker."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from benchmarks.harness import Case
from benchmarks.mixes import MIX
from benchmarks.peers import DEFAULT, MORE, ROUTED, ROUTED_BATCH
from benchmarks.shapes import DEMO, HALF_BILLION, INTERNVL, QWEN3_VL, SMOLVLM, Shape

_ROUNDS = {DEMO.name: 9, HALF_BILLION.name: 3, QWEN3_VL.name: 3}  # a short call needs more of them
_RELATIVES = (SMOLVLM, INTERNVL, QWEN3_VL)
_BOTH = (torch.float32, torch.bfloat16)


def _case(shape: Shape, dtype: torch.dtype, batch: int) -> Case:
    # Arrangements save launches, which a CPU hardly notices: they are shown at batch 1 only.
    peers = DEFAULT if batch == 1 else DEFAULT[:-2]
    return Case(shape, dtype, batch, rounds=_ROUNDS.get(shape.name, 5), peers=peers)


def default_cases() -> list[Case]:
    """Two shapes at batch 1 in fp32 and bf16, at batch 4 in bf16; relatives of LLaVA in fp32."""
    settings = ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 4))
    cases = [_case(shape, *setting) for shape in (DEMO, HALF_BILLION) for setting in settings]
    relatives = [_case(shape, torch.float32, 1) for shape in _RELATIVES]
    return [*cases, *relatives, mixed_case(), *routing_cases()]


def mixed_case() -> Case:
    """Unlike prompts: one image, none, two; short and long."""
    case = _case(HALF_BILLION, torch.float32, len(MIX))
    return replace(case, subject="unlike prompts", mix=MIX)


def routing_cases() -> list[Case]:
    """Rows routed individually against static skips at the same rate.

    In fp32, since processors without bf16 instructions take minutes for a prompt in bf16.
    """
    case = Case(HALF_BILLION, torch.float32, 1, rounds=5, peers=ROUTED, subject="routing")
    return [case, replace(case, batch=4, peers=ROUTED_BATCH)]


def full_cases() -> list[Case]:
    """All peers; more batches, prompts and answers. Hours on a small machine."""
    cases = []
    for shape, dtype, batch in product((DEMO, HALF_BILLION), _BOTH, (1, 2, 4, 8)):
        case = replace(_case(shape, dtype, batch), peers=(*DEFAULT, *MORE))
        cases.append(replace(case, n_new=64))
        if batch == 1:
            longer = (replace(shape, text_after=length) for length in (4, 256))
            cases += (replace(case, shape=prompt) for prompt in longer)
    return cases
