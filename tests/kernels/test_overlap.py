"""Launches that overlap: who takes part in a step, and what each is told."""

from typing import Any

import pytest
import torch

from fastskip.kernels import launch, overlap
from fastskip.kernels.launch import Launch
from fastskip.launches import decode_launches
from fastskip.ops.overlap import Overlap, can_overlap, overlapping
from fastskip.plan import ModelShape, make_plan
from fastskip.policy import SkipPolicy
from tests.policies import Policy, pair, parallel, policy_of, skip
from tests.routing.routed import random, routed, similarity

SHAPE = ModelShape(
    depth=4,
    hidden_size=1024,
    ffn_size=2048,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=4096,
    has_images=True,
    dtype_bytes=2,
    max_positions=512,
)
TABLE = "nvidia-h200"
POLICIES: dict[str, Policy] = {
    "dense": policy_of(),
    "half": policy_of(skip("1::2", "all", "block")),
    "parallel": policy_of(arrangements=(parallel(":"),)),
    "pairs": policy_of(arrangements=(pair(":"),)),
    "random": routed(random(":", rate=0.5)),
    "similar, batch": routed(similarity("1:", threshold=0.9, group="batch")),
}
ROUTED = ("random", "similar, batch")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """All that are written down."""
    made: list[Launch] = []

    def note(*arguments: Any) -> Launch:
        made.append(Launch(*arguments))
        return made[-1]

    monkeypatch.setattr(launch, "Launch", note)
    return made


def step(policy: Policy, batch: int) -> None:
    decode_launches(make_plan(SkipPolicy.from_dict(policy), SHAPE), batch, 256, TABLE)


@pytest.mark.parametrize("how", [Overlap.START, Overlap.READ])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("name", POLICIES)
def test_every_kernel_of_a_step_takes_part(
    launches: list[Launch], name: str, batch: int, how: Overlap
) -> None:
    """One that does not is launched as ever, which is right, but nothing overlaps there."""
    with overlapping(how):
        step(POLICIES[name], batch)
    own = [each for each in launches if each.kernel is not None]
    assert own and all(each.options["launch_pdl"] is True for each in own)
    assert all(each.arguments["OVERLAP"] is True for each in own)
    assert any(each.is_guarded for each in own) == (name in ROUTED)
    ahead = {each.name for each in own if each.arguments.get("READS_AHEAD")}
    assert ahead == ({"attend_step", "add_terms"} if how is Overlap.READ else set())


def test_without_it_launches_are_ordinary(launches: list[Launch]) -> None:
    with overlapping(Overlap.START), overlap.overlapping(False), overlapping(Overlap.NONE):
        step(POLICIES["random"], 1)
    step(POLICIES["dense"], 1)
    assert launches and not any("launch_pdl" in each.options for each in launches)
    assert {each.arguments.get("OVERLAP") for each in launches} == {False}


@pytest.mark.parametrize(("found", "can"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_it_takes_hopper(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], can: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    assert can_overlap(torch.device("cuda")) is can
    assert not can_overlap(torch.device("cpu"))
