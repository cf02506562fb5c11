"""Programs that go through several tiles yield what one program a tile does, to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastskip.kernels.feed import feed
from fastskip.kernels.head import head_choose, head_logits
from fastskip.kernels.launch import recording
from fastskip.kernels.operands import product_candidates, share_out
from fastskip.kernels.projection import project_append
from fastskip.ops import allocate
from tests.kernels.sublayers import FeedCase, Place, ProjectionCase, memory
from tests.kernels.test_head import build, cast
from tests.kernels.test_sampler import assert_same, build_choice

ONE = {"BLOCK_M": 8, "BLOCK_N": 1, "BLOCK_E": 32, "STAGES": 2, "num_warps": 4}
FEW = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_E": 32, "STAGES": 2, "NORM_APART": 0, "num_warps": 4}
WAYS = [
    pytest.param(config, rows, long, id=f"{rows} rows, {long} programs")
    for config, rows in ((ONE, 1), (ONE, 2), (FEW, 6))
    for long in (1, 3)
]
HEADS = ProjectionCase(4, 2, 16, 96)
GATED = FeedCase(40, 96)


def programs(call: Any) -> int:
    """Of the second axis of the one launch of a product."""
    with recording(is_dry=True) as account:
        call()
    return int(account.launches[-1].grid[1])


@pytest.mark.parametrize(("config", "rows", "long"), WAYS)
def test_feed(config: dict[str, int], rows: int, long: int, device: torch.device) -> None:
    place = Place(torch.bfloat16, device)
    h, part = place.numbers(rows, 96, seed=2), GATED.build(place)
    with allocate.poisoned():
        (right,) = feed(h, [part], config=config)
        (found,) = feed(h, [part], config={**config, "LONG": long})
    assert torch.equal(found, right)
    assert programs(lambda: feed(h, [part], config={**config, "LONG": long})) == long


@pytest.mark.parametrize(("config", "rows", "long"), WAYS)
def test_projection(config: dict[str, int], rows: int, long: int, device: torch.device) -> None:
    place = Place(torch.bfloat16, device)
    h = place.numbers(rows, 96, seed=2)
    found = []
    for more in ({}, {"LONG": long}):
        own = HEADS.build(rows, place)
        assert own.pages is not None
        with allocate.poisoned():
            (queries,) = project_append(h, [own], config={**config, **more})
        found.append((queries, memory(own.pages).nan_to_num(7.0)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    own = HEADS.build(rows, place)
    assert programs(lambda: project_append(h, [own], config={**config, "LONG": long})) == long


@pytest.mark.parametrize(("config", "rows", "long"), WAYS)
def test_head(config: dict[str, int], rows: int, long: int, device: torch.device) -> None:
    given = cast(*build(rows, "rms", True), device, torch.bfloat16)
    longer = {**config, "LONG": long}
    with allocate.poisoned():
        right = head_logits(*given, config=config)
        assert torch.equal(head_logits(*given, config=longer), right)
    choices = [build_choice(rows, device) for _ in range(2)]
    for choice, each in zip(choices, (config, longer), strict=True):
        head_choose(*given, choice, config=each)
    assert_same(*choices)


@pytest.mark.parametrize(("config", "rows", "long"), WAYS)
@pytest.mark.parametrize("leaves_all", (False, True))
def test_guarded(
    config: dict[str, int], rows: int, long: int, leaves_all: bool, device: torch.device
) -> None:
    """Some rows run, all, or none: then nothing is written but what all leave."""
    place = Place(torch.bfloat16, device)
    h, part = place.numbers(rows, 96, seed=2), GATED.build(place)
    for runs in ([1] * rows, [1, *[0] * (rows - 1)], [0] * rows):
        chosen = place.chosen(tuple(runs))
        found = []
        for more in ({}, {"LONG": long}):
            own = replace(HEADS.build(rows, place), leaves_all=leaves_all)
            assert own.pages is not None
            with allocate.poisoned():
                (queries,) = project_append(h, [own], chosen=chosen, config={**config, **more})
                (fed,) = feed(h, [part], chosen=chosen, config={**config, **more})
            found.append([queries, fed, memory(own.pages)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        idle = [number for number, runs_too in enumerate(runs) if not runs_too]
        if config["BLOCK_N"] == 1:
            assert found[1][1][idle].isnan().all()
    longer = {**config, "LONG": long}
    assert programs(lambda: feed(h, [part], chosen=chosen, config=longer)) == long


def test_pairs_have_a_program_a_tile(device: torch.device) -> None:
    place = Place(torch.bfloat16, device)
    h, config = place.numbers(1, 96, seed=2), {**ONE, "LONG": 3}
    pair = [GATED.build(place), GATED.build(place)]
    assert programs(lambda: feed(h, pair, config=config)) == 2 * 10


def test_share_out() -> None:
    blocks = {"BLOCK_M": 8, "LONG": 4}
    assert share_out({**blocks}, 9, 9, may_be_long=True) == (4, True)
    assert share_out({**blocks}, 4, 4, may_be_long=True) == (4, False)
    assert share_out({**blocks}, 9, 5, may_be_long=False) == (5, False)
    assert share_out({"BLOCK_M": 8}, 9, 9, may_be_long=True) == (9, False)
    assert share_out(blocks, 9, 9, may_be_long=True) and blocks == {"BLOCK_M": 8}
    offered = product_candidates(1, may_be_long=True)
    assert any("LONG" in each for each in offered)
    assert not any("LONG" in each for each in product_candidates(1))
