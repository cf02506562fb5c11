"""Presets: what they leave out on a 32-layer model, their options, and their errors."""

from __future__ import annotations

import pytest

from fastskip.plan import ModelShape, SkipPlan, make_plan
from fastskip.policy import Arrangement, Norm, PolicyError, SkippedKV, SkipPolicy, TokenClass
from fastskip.policy.presets import PRESETS

IMAGE, TEXT, GENERATED = TokenClass


def plan(name: str, **options: object) -> SkipPlan:
    shape = ModelShape(
        depth=32,
        hidden_size=8,
        ffn_size=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=10,
        has_images=True,
        dtype_bytes=2,
        max_positions=64,
    )
    return make_plan(SkipPolicy.preset(name, **options), shape)


def missing(plan: SkipPlan, sublayer: str, token_class: TokenClass) -> list[int]:
    """The layers in which rows of a class leave a sublayer out."""
    return [p.index for p in plan.layers if not getattr(p.cells[token_class], sublayer)]


def test_table_names_functions_and_describes_them() -> None:
    for name, (function, line) in PRESETS.items():
        made = SkipPolicy.preset(name)
        assert made.name == name and line and "\n" not in line
        if not name.startswith("paper/"):
            assert function.__name__ == name
            assert (*made.rules, *made.arrangements, *made.removals) == function()


OWN = [name for name in PRESETS if not name.startswith("paper/")]


@pytest.mark.parametrize("name", [name for name in OWN if name != "visual_withdrawal"])
def test_defaults_leave_the_last_layer_dense(name: str) -> None:
    last = plan(name).layers[-1]
    assert all(cell.attention and cell.ffn for cell in last.cells.values())
    assert last.arrangement is Arrangement.SEQUENTIAL
    assert plan(name).is_dense == (name == "dense")


def test_every_nth_is_multiples_of_the_interval_by_default() -> None:
    assert missing(plan("every_nth_block"), "attention", TEXT) == list(range(2, 31, 2))
    assert missing(plan("every_nth_ffn", interval=4), "ffn", IMAGE) == list(range(4, 31, 4))
    made = plan("every_nth_attention", interval=3, start=1, end=32, scope="image", kv="reuse")
    assert missing(made, "attention", IMAGE) == list(range(1, 32, 3))
    assert missing(made, "attention", TEXT) == missing(made, "ffn", IMAGE) == []
    assert made.layers[1].cells[IMAGE].kv is SkippedKV.REUSE


@pytest.mark.parametrize("scope", ["all", *TokenClass])
def test_every_nth_scopes(scope: str) -> None:
    made = plan("every_nth_block", scope=scope)
    for token_class in TokenClass:
        skips = scope in ("all", token_class)
        assert bool(missing(made, "ffn", token_class)) == skips


def test_visual_presets() -> None:
    frozen = plan("frozen_visual", start=10).layers[20]
    assert frozen.attending == frozen.feeding == {TEXT, GENERATED}
    assert frozen.projecting == set(TokenClass)
    gone = plan("visual_withdrawal", after=15)
    assert missing(gone, "attention", IMAGE) == missing(gone, "ffn", IMAGE) == list(range(16, 32))
    assert gone.layers[16].holding == {TEXT, GENERATED}
    assert missing(plan("image_ffn", start=4), "ffn", IMAGE) == list(range(4, 31))


def test_arrangement_presets() -> None:
    shared = plan("parallel_blocks", start=30, norm="shared").layers[30]
    assert (shared.arrangement, shared.norm) == (Arrangement.PARALLEL, Norm.SHARED)
    pairs = plan("block_pairs", start=26, combine="mean")
    assert pairs.steps[-4:] == ((26, 27), (28, 29), (30,), (31,))
    with pytest.raises(PolicyError, match="even number"):
        plan("block_pairs", start=3)


@pytest.mark.parametrize(
    ("name", "options", "field", "allowed"),
    [
        ("skip_all", {}, "preset", "every_nth_block"),
        ("", {}, "preset", "frozen_visual"),
        ("dense", {"interval": 2}, "dense.interval", "no options"),
        ("every_nth_ffn", {"kv": "omit"}, "every_nth_ffn.kv", "interval"),
        ("every_nth_ffn", {"interval": 0}, "every_nth_ffn.interval", ">= 1"),
        ("every_nth_ffn", {"interval": True}, "every_nth_ffn.interval", "integer"),
        ("every_nth_ffn", {"start": "1"}, "every_nth_ffn.start", "integer"),
        ("every_nth_ffn", {"end": 2.0}, "every_nth_ffn.end", "integer"),
        ("every_nth_ffn", {"scope": "visual"}, "every_nth_ffn.scope", "image"),
        ("every_nth_block", {"scope": ["image"]}, "every_nth_block.scope", "all"),
        ("every_nth_block", {"kv": "keep"}, "every_nth_block.kv", "reuse"),
        ("visual_withdrawal", {"after": -1}, "visual_withdrawal.after", ">= 0"),
        ("parallel_blocks", {"norm": "none"}, "parallel_blocks.norm", "shared"),
        ("block_pairs", {"combine": 1}, "block_pairs.combine", "mean"),
    ],
)
def test_errors(name: str, options: dict[str, object], field: str, allowed: str) -> None:
    with pytest.raises(PolicyError) as caught:
        SkipPolicy.preset(name, **options)
    assert caught.value.field == field
    assert allowed in caught.value.allowed


def test_removal_presets() -> None:
    made = SkipPolicy.preset("pyramid_drop", stages=[1, 3], ratio=0.25)
    assert [(r.after_layer, r.keep.by.value, r.keep.ratio) for r in made.removals] == [
        (1, "next_attention", 0.25),
        (3, "next_attention", 0.25),
    ]
    assert SkipPolicy.preset("random_removal", seed=4).removals[0].seed == 4
    # As the command line hands them on.
    for stages, layers in (("2, 4", [2, 4]), (3, [3])):
        text = SkipPolicy.preset("pyramid_drop", stages=stages)
        assert [r.after_layer for r in text.removals] == layers
    for name, options, field in (
        ("fastv", {"ratio": 1}, "fastv.ratio"),
        ("fastv", {"ratio": 10**400}, "fastv.ratio"),
        ("pyramid_drop", {"stages": "2,²"}, "pyramid_drop.stages"),
        ("fastv", {"after": "2"}, "fastv.after"),
        ("pyramid_drop", {"stages": []}, "pyramid_drop.stages"),
        ("pyramid_drop", {"stages": [3, -1]}, "pyramid_drop.stages"),
    ):
        with pytest.raises(PolicyError) as caught:
            SkipPolicy.preset(name, **options)
        assert caught.value.field == field
