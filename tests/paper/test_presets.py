"""Which layers the papers' modes select, whose rows they are for, and their errors."""

from typing import Any

import pytest

from fastskip.plan import ModelShape, SkipPlan, make_plan
from fastskip.policy import PolicyError, SkipPolicy, TokenClass
from fastskip.policy.paper_presets import PAPER_PRESETS, SCOPES, selected

IMAGE, TEXT, GENERATED = TokenClass


def shape(depth: int = 32, *, has_images: bool = True, gated: bool = True) -> ModelShape:
    return ModelShape(
        depth=depth,
        hidden_size=16,
        ffn_size=32,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        vocab_size=10,
        has_images=has_images,
        gated_ffn=gated,
        dtype_bytes=2,
        max_positions=64,
    )


def plan(name: str, of: int = 32, **options: Any) -> SkipPlan:
    """On a model of that many layers."""
    return make_plan(SkipPolicy.preset(f"paper/{name}", **options), shape(of))


def skipping(plan: SkipPlan, sublayer: str, token_class: TokenClass = TEXT) -> list[int]:
    return [p.index for p in plan.layers if not getattr(p.cells[token_class], sublayer)]


NAMES = (
    "skip-block skip-ffn skip-attention parallel-attention parallel-block drop exit "
    "visual-withdrawal random token-ratio-ffn unimodal-mask entropy token-index"
)


def test_names() -> None:
    assert list(PAPER_PRESETS) == [f"paper/{name}" for name in NAMES.split()]


@pytest.mark.parametrize("depth", [8, 24, 32, 40])
@pytest.mark.parametrize("name", NAMES.split())
def test_defaults_alone_make_a_plan_that_is_not_dense(name: str, depth: int) -> None:
    made = plan(name, depth)
    assert not made.is_dense
    again = SkipPolicy.from_dict(made.policy.to_dict())
    assert again == made.policy and make_plan(again, shape(depth)).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("interval", "start", "count"),
    [(2, 0, 15), (2, 4, 13), (3, 0, 10), (3, 4, 9), (4, 0, 7), (4, 4, 6)],
)
def test_counts_of_selected_layers(interval: int, start: int, count: int) -> None:
    for depth in (None, 32):
        made = plan("skip-block", interval=interval, start=start, depth=depth)
        assert len(skipping(made, "ffn")) == count
        assert skipping(made, "ffn") == skipping(made, "attention")


def test_bounds_are_exclusive() -> None:
    assert skipping(plan("skip-ffn", start=4, end=9), "ffn") == [6, 8]
    assert skipping(plan("skip-ffn", start=4, end=8), "ffn") == [6]
    assert skipping(plan("skip-ffn", interval=1, start=-1, end=32), "ffn") == list(range(32))
    assert selected(3, 0, -1) == "3:-1:3" and selected(1, 5, 9) == "6:9"


def test_an_interval_for_each_segment() -> None:
    late = list(range(16, 31, 2))
    for interval in ("4,3,2,2", [4, 3, 2, 2]):
        found = plan("skip-attention", interval=interval, depth=32)
        assert skipping(found, "attention") == [4, 9, 12, 15, *late]
        assert skipping(found, "ffn") == []
    # The last segment takes the layers that are left over.
    assert selected((3, 2, 5), 0, -1, 11) == [4]  # 10 is the end
    assert selected((3, 2, 5), 0, 11, 11) == [4, 10]


@pytest.mark.parametrize("scope", SCOPES)
def test_scopes(scope: str) -> None:
    wanted = {
        "all": set(TokenClass),
        "prompt": {IMAGE, TEXT},
        "image": {IMAGE},
        "text": {TEXT},
        "generated": {GENERATED},
    }[scope]
    made = plan("skip-block", scope=scope)
    assert {c for c in TokenClass if skipping(made, "ffn", c)} == wanted
    for name in ("parallel-attention", "parallel-block"):
        assert {frozenset(p.arranged) for p in plan(name, scope=scope).layers} == {
            frozenset(),
            frozenset(wanted),
        }
    for name in ("entropy", "token-index", "random", "token-ratio-ffn"):
        assert {cell.token_class for cell in plan(name, scope=scope).routed} == wanted


def test_pairs() -> None:
    pairs = [step for step in plan("parallel-block").steps if len(step) == 2]
    assert pairs == [(n, n + 1) for n in range(2, 30, 2)]
    apart = plan("parallel-block", interval=4, start=3, end=-1, depth=32)
    assert [step for step in apart.steps if len(step) == 2] == [(n, n + 1) for n in range(4, 30, 4)]


def test_late_layers_and_exits() -> None:
    assert skipping(plan("drop", start=20, end=24), "attention") == [20, 21, 22, 23]
    gone = plan("visual-withdrawal", after=15)
    assert skipping(gone, "ffn", IMAGE) == list(range(16, 32)) and not skipping(gone, "ffn")
    assert IMAGE not in gone.layers[16].holding
    assert {cell.layer for cell in plan("exit", after=-2).routed} == {31}
    assert {cell.layer for cell in plan("exit", after=4).routed} == {5}
    assert skipping(plan("visual-withdrawal", after=-2), "ffn", IMAGE) == [31]


def test_first_layers_are_masked() -> None:
    assert [p.index for p in plan("unimodal-mask", layers=3).layers if p.unimodal] == [0, 1, 2]


def test_routed_layers() -> None:
    ratio = plan("token-ratio-ffn", ratio=0.25, start=3)
    assert sorted({cell.layer for cell in ratio.routed}) == list(range(4, 31))
    assert {cell.rule.rate for cell in ratio.routed} == {0.25}
    assert sorted({cell.layer for cell in plan("entropy", start=2).routed}) == list(range(3, 31))
    # The layer before the first is looked at.
    assert sorted({cell.layer for cell in plan("token-index", start=2).routed})[0] == 2


def test_text_only_models_take_scopes_without_images() -> None:
    for name in ("skip-block", "parallel-block", "entropy"):
        policy = SkipPolicy.preset(f"paper/{name}", scope="text")
        assert not make_plan(policy, shape(has_images=False)).is_dense
        with pytest.raises(PolicyError, match="text-only"):
            make_plan(SkipPolicy.preset(f"paper/{name}", scope="image"), shape(has_images=False))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("skip-block", {"interval": 0}, "paper/skip-block.interval"),
    ("skip-block", {"interval": "4,x"}, "paper/skip-block.interval"),
    ("skip-block", {"interval": [2, 3]}, "paper/skip-block.depth"),
    ("skip-block", {"interval": 40, "depth": 32}, "paper/skip-block.interval"),
    ("skip-block", {"interval": [1] * 9, "depth": 8}, "paper/skip-block.interval"),
    ("skip-block", {"start": -2}, "paper/skip-block.start"),
    ("skip-block", {"scope": "words"}, "paper/skip-block.scope"),
    ("skip-block", {"semantics": "exact"}, "paper/skip-block.semantics"),
    ("skip-block", {"span": 3}, "paper/skip-block.span"),
    ("skip-ffn", {"kv": "omit"}, "paper/skip-ffn.kv"),
    ("parallel-block", {"interval": 3}, "paper/parallel-block.interval"),
    ("parallel-block", {"start": 30, "depth": 32}, "paper/parallel-block.end"),
    ("random", {"interval": 1}, "paper/random.interval"),
    ("random", {"skip": "head"}, "paper/random.skip"),
    ("random", {"skip": "attention", "semantics": "reference"}, "paper/random.skip"),
    ("token-ratio-ffn", {"ratio": 1.5}, "paper/token-ratio-ffn.ratio"),
    ("entropy", {"threshold": "low"}, "paper/entropy.threshold"),
    ("entropy", {"threshold": 10**400}, "paper/entropy.threshold"),
    ("skip-block", {"interval": "²,2", "depth": 32}, "paper/skip-block.interval"),
    ("skip-block", {"interval": "9" * 5000}, "paper/skip-block.interval"),
    ("skip-block", {"depth": 10**9}, "paper/skip-block.depth"),
    ("parallel-block", {"depth": "x"}, "paper/parallel-block.depth"),
    ("exit", {"after": -1}, "paper/exit.after"),
    ("visual-withdrawal", {"after": -1}, "paper/visual-withdrawal.after"),
    ("unimodal-mask", {"layers": 0}, "paper/unimodal-mask.layers"),
]


@pytest.mark.parametrize(("name", "options", "field"), WRONG)
def test_wrong_options_are_named(name: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        SkipPolicy.preset(f"paper/{name}", **options)
    assert caught.value.field == field


def test_hidden_states_must_fit_k_and_v() -> None:
    grouped = ModelShape(**{**_fields(shape()), "num_kv_heads": 2})
    policy = SkipPolicy.preset("paper/skip-attention", scope="prompt", semantics="reference")
    with pytest.raises(PolicyError, match="2 K and V heads of 4, hidden size 16"):
        make_plan(policy, grouped)
    # Where nobody attends nothing is left either.
    make_plan(SkipPolicy.preset("paper/skip-attention", semantics="reference"), grouped)


def test_reference_semantics_of_opt() -> None:
    stacked = make_plan(
        SkipPolicy.preset("paper/parallel-attention", semantics="reference"), shape(gated=False)
    )
    assert stacked.layers[1].norm == "stacked" and "stacked" in stacked.table()
    alone = SkipPolicy.preset("paper/skip-attention", semantics="reference")
    assert make_plan(alone, shape(gated=False)).layers[2].replaced == set(TokenClass)
    assert make_plan(alone, shape()).layers[2].norm == "shared"


def _fields(shape: ModelShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in ModelShape.__dataclass_fields__}
