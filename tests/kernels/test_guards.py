"""Guarded launches: how many programs they have, and with which configuration."""

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.tables import Question
from fastskip.kernels import guards, tuning

CPU = torch.device("cpu")
SHAPE = (12288, 4096)


@pytest.mark.parametrize(
    ("rows", "block", "tiles", "width"),
    # Blocks of rows share the programs; each has one, and no more than there are tiles.
    [(1, 1, 768, 264), (4, 2, 768, 132), (3, 2, 768, 132), (16, 16, 192, 192), (600, 2, 768, 1)],
)
def test_width(rows: int, block: int, tiles: int, width: int) -> None:
    blocks = {"BLOCK_N": block, "PROGRAMS": 264}
    assert guards.width_of({**blocks}, rows, tiles, is_guarded=False) == tiles
    assert guards.width_of(blocks, rows, tiles, is_guarded=True) == width
    assert blocks == {"BLOCK_N": block}
    assert guards.width_of(blocks, rows, tiles, is_guarded=True) == tiles


def test_a_guarded_entry_replaces_numbers_of_the_kernel() -> None:
    with tuning.table("nvidia-h200"):
        own = tuning.config_for("feed", CPU, 16, (9728, 896))
        guarded = tuning.config_over("feed", guards.TABLE, CPU, 16, (9728, 896))
        assert tuning.config_over("feed", None, CPU, 16, (9728, 896)) == own
    assert guarded == {**own, "PROGRAMS": 264, "num_warps": 8} != own


def test_there_are_candidates() -> None:
    """For the question that a guarded launch asks, and no other kernel's answers it."""
    current = {"PROGRAMS": 264}
    offered = tune.candidates_of(Question("guarded", 1, SHAPE), current)
    assert offered == [current, *({"PROGRAMS": each} for each in (132, 528, 1056, 2112))]
