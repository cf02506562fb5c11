"""Plans: how rules become cells, what conflicts, and what the cache is said to hold."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastskip.plan import Cell, ModelShape, SkipPlan, make_plan
from fastskip.policy import (
    Arrangement,
    ArrangementRule,
    Combine,
    Keep,
    MaskRule,
    Norm,
    PolicyError,
    RemovalRule,
    RouterRule,
    SkippedKV,
    SkipPolicy,
    SkipRule,
    Sublayer,
    TokenClass,
)
from tests.policy.test_policy import EXAMPLE

IMAGE, TEXT, GENERATED = TokenClass
EVERY = frozenset(TokenClass)


def shape(depth: int = 8, *, has_images: bool = True) -> ModelShape:
    return ModelShape(
        depth=depth,
        hidden_size=8,
        ffn_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=10,
        has_images=has_images,
        dtype_bytes=2,
        max_positions=64,
    )


def plan_of(*rules: SkipRule, depth: int = 8, has_images: bool = True, **others: Any) -> SkipPlan:
    return make_plan(SkipPolicy(rules, **others), shape(depth, has_images=has_images))


def test_empty_policy_is_dense() -> None:
    plan = plan_of()
    assert plan.is_dense
    assert plan.steps == tuple((layer,) for layer in range(8))
    assert plan.groups == (EVERY,)
    assert all(p.attending == p.holding == p.feeding == EVERY for p in plan.layers)


def test_example_plans_on_32_layers() -> None:
    plan = make_plan(SkipPolicy.from_dict(EXAMPLE), shape(32))
    assert plan.layers[4].feeding == {TEXT, GENERATED}
    assert all(not (p.feeding or p.holding) for p in (plan.layers[20], plan.layers[22]))
    assert plan.layers[9].arrangement is Arrangement.PARALLEL
    assert plan.steps[24:26] == ((24, 25), (26, 27))
    assert (plan.layers[24].partner, plan.layers[25].partner) == (25, 24)
    assert {(cell.layer, cell.token_class) for cell in plan.routed} == {
        (layer, c) for layer in range(12, 20) for c in (TEXT, GENERATED)
    }
    assert plan.layers[12].feeding == {TEXT, GENERATED}  # a routed cell counts as running
    assert plan.when_skipping.layers[12].feeding == frozenset()
    assert not plan.when_skipping.routed


def test_rules_add_up() -> None:
    plan = plan_of(
        SkipRule("2:4", IMAGE, "ffn"),
        SkipRule("3:5", IMAGE, "attention", "omit"),
        SkipRule([3], "all", "ffn"),
    )
    assert plan.layers[2].cells[IMAGE] == Cell(True, False)
    assert plan.layers[3].cells[IMAGE] == Cell(False, False, SkippedKV.OMIT)
    assert plan.layers[3].cells[TEXT] == Cell(True, False)
    assert plan.layers[4].cells[IMAGE] == Cell(False, True, SkippedKV.OMIT)
    assert plan.groups == (frozenset({IMAGE}), frozenset({TEXT, GENERATED}))


def test_skipped_attention_names_no_kv_means_project() -> None:
    layer = plan_of(SkipRule([3], IMAGE, "attention")).layers[3]
    assert layer.cells[IMAGE].kv is SkippedKV.PROJECT
    assert layer.projecting == layer.holding == EVERY
    assert layer.attending == {TEXT, GENERATED}


@pytest.mark.parametrize("kv", SkippedKV)
def test_layer_that_no_class_attends_holds_nothing(kv: SkippedKV) -> None:
    plan = plan_of(
        SkipRule([3], "all", "attention", kv), SkipRule([4], IMAGE, "attention", "reuse")
    )
    layer = plan.layers[3]
    assert not layer.holds_kv and not layer.holding and not layer.projecting
    assert all(cell.kv is SkippedKV.OMIT for cell in layer.cells.values())
    assert layer.feeding
    assert plan.layers[4].cells[IMAGE].kv_source == 2  # passes over layer 3


def test_every_class_is_over_the_classes_of_the_model() -> None:
    rule = SkipRule([3], [TEXT, GENERATED], "attention", "project")
    assert plan_of(rule).layers[3].holding == EVERY
    text_only = plan_of(rule, has_images=False)
    assert text_only.classes == (TEXT, GENERATED)
    assert not text_only.layers[3].holds_kv


def test_reuse_finds_the_nearest_entry_or_becomes_omit() -> None:
    plan = plan_of(
        SkipRule([0, 3, 4], IMAGE, "attention", "reuse"),
        SkipRule([2], IMAGE, "attention", "omit"),
    )
    assert plan.layers[0].cells[IMAGE] == Cell(False, True, SkippedKV.OMIT)
    assert plan.layers[3].cells[IMAGE].kv_source == 1  # layer 2 omits
    assert plan.layers[4].cells[IMAGE].kv_source == 3  # itself a copy
    assert plan.layers[4].reusing == {3: {IMAGE}}
    assert plan.layers[4].holding == EVERY
    assert plan.layers[4].projecting == {TEXT, GENERATED}


def test_reuse_sources_may_differ_between_classes() -> None:
    plan = plan_of(
        SkipRule([4], [IMAGE, TEXT], "attention", "reuse"),
        SkipRule([3], [IMAGE], "attention", "omit"),
    )
    assert plan.layers[4].reusing == {2: {IMAGE}, 3: {TEXT}}
    assert len(plan.groups) == 3


def test_arrangements() -> None:
    plan = plan_of(
        SkipRule([1], IMAGE, "ffn"),
        arrangements=(
            ArrangementRule("0:2", "parallel", norm="shared"),
            ArrangementRule("2:6", "pair", combine="mean"),
        ),
    )
    assert plan.layers[1].norm is Norm.SHARED
    assert plan.layers[1].feeding == {TEXT, GENERATED}
    assert plan.layers[4].combine is Combine.MEAN
    assert plan.steps == ((0,), (1,), (2, 3), (4, 5), (6,), (7,))
    assert not plan.is_dense
    assert plan.layers[7].arrangement is Arrangement.SEQUENTIAL


ROUTER = RouterRule([2], TEXT, "ffn", threshold=0.5)
PAIR = ArrangementRule([[2, 3]], "pair")
CONFLICTS: list[tuple[dict[str, Any], str, str]] = [
    # policy, field named by the error, part of the message
    ({"rules": [SkipRule("0:9", skip="ffn")]}, "rules[0].layers", "[-8, 8]"),
    ({"rules": [SkipRule("5:5", skip="ffn")]}, "rules[0].layers", "selects"),
    ({"rules": [SkipRule([8], skip="ffn")]}, "rules[0].layers", "[0, 8)"),
    ({"arrangements": [ArrangementRule([8], "parallel")]}, "arrangements[0].layers", "[0, 8)"),
    ({"arrangements": [ArrangementRule([[7, 8]], "pair")]}, "arrangements[0].layers", "[0, 8)"),
    ({"arrangements": [ArrangementRule("0:3", "pair")]}, "arrangements[0].layers", "even number"),
    (
        {"routers": [RouterRule("0:9", skip="ffn", threshold=0.5)]},
        "routers[0].layers",
        "[-8, 8]",
    ),
    (
        {"rules": [SkipRule(":", IMAGE, "block", "omit"), SkipRule([2], "all", "attention")]},
        "rules[1].kv",
        '"omit" there, as in rules[0].kv',
    ),
    (
        {
            "rules": [
                SkipRule([2], TEXT, "attention"),
                SkipRule([2], TEXT, "ffn"),
                SkipRule([1, 2], TEXT, "block", "reuse"),
            ]
        },
        "rules[2].kv",
        "layer 2, text",
    ),
    ({"rules": [SkipRule([2], "all", "ffn")], "routers": [ROUTER]}, "routers[0].skip", "layer 2"),
    ({"routers": [ROUTER, ROUTER]}, "routers[1].skip", "already has"),
    ({"routers": [ROUTER], "arrangements": [PAIR]}, "routers[0].layers", "pair"),
    (
        {"rules": [SkipRule([3], GENERATED, "ffn")], "arrangements": [PAIR]},
        "arrangements[0].layers",
        "layer 3 is in a pair but also has a skip",
    ),
    ({"arrangements": [PAIR, PAIR]}, "arrangements[1].layers", "arrangements[0]"),
    (
        {"arrangements": [PAIR, ArrangementRule(":", "parallel")]},
        "arrangements[1].layers",
        "layer 2",
    ),
]


@pytest.mark.parametrize(("policy", "field", "message"), CONFLICTS)
def test_conflicts(policy: dict[str, list[Any]], field: str, message: str) -> None:
    fields: dict[str, Any] = {key: tuple(value) for key, value in policy.items()}
    with pytest.raises(PolicyError) as caught:
        make_plan(SkipPolicy(**fields), shape())
    assert caught.value.field == field
    assert message in str(caught.value)


def test_same_kv_twice_is_no_conflict() -> None:
    plan_of(SkipRule([2], IMAGE, "attention"), SkipRule([2], "all", "block", "project"))


def test_router_beside_a_rule_on_the_other_sublayer() -> None:
    plan = plan_of(SkipRule([2], TEXT, "attention"), routers=(ROUTER,))
    assert plan.layers[2].cells[TEXT] == Cell(False, True, SkippedKV.PROJECT)
    assert plan.groups == (frozenset({IMAGE, GENERATED}), frozenset({TEXT}))


@pytest.mark.parametrize("tokens", [[IMAGE], [IMAGE, TEXT]])
def test_text_only_model_refuses_image_rules(tokens: list[TokenClass]) -> None:
    with pytest.raises(PolicyError, match="text-only") as caught:
        plan_of(SkipRule(":4", tokens, "ffn"), has_images=False)
    assert caught.value.field == "rules[0].tokens"
    with pytest.raises(PolicyError, match="text-only"):
        plan_of(has_images=False, routers=(RouterRule([1], tokens, "ffn", threshold=0),))


def test_fingerprint_follows_execution_only() -> None:
    written = plan_of(SkipRule("2:4", IMAGE, "ffn"), name="a")
    other = plan_of(SkipRule([3], IMAGE, "ffn"), SkipRule([2], IMAGE, "ffn"), name="b")
    assert written.fingerprint == other.fingerprint
    assert written.policy != other.policy
    different = [
        plan_of(),
        plan_of(depth=9),
        plan_of(has_images=False),
        plan_of(SkipRule([2], IMAGE, "ffn")),
        plan_of(SkipRule([2], IMAGE, "attention")),
        plan_of(SkipRule([2], IMAGE, "attention", "omit")),
        plan_of(SkipRule([2], IMAGE, "attention", "reuse")),
        plan_of(arrangements=(ArrangementRule([2], "parallel"),)),
        plan_of(arrangements=(ArrangementRule([2], "parallel", norm="shared"),)),
        plan_of(arrangements=(PAIR,)),
        plan_of(arrangements=(ArrangementRule([[2, 3]], "pair", combine="mean"),)),
        plan_of(routers=(ROUTER,)),
        plan_of(routers=(RouterRule([2], TEXT, "ffn", threshold=0.6),)),
    ]
    prints = {plan.fingerprint for plan in [written, *different]}
    assert len(prints) == 1 + len(different)


def test_order_is_the_same_in_every_process() -> None:
    code = (
        "from tests.plan.test_plan import *; p = plan_of(SkipRule(':3', [TEXT, IMAGE], 'block'));"
        "print(p.fingerprint, [sorted(g) for g in p.groups], p.table())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_plans_can_be_copied_and_pickled() -> None:
    plan = plan_of(
        SkipRule("2:4", IMAGE, "block", "reuse"), arrangements=(ArrangementRule([5], "parallel"),)
    )
    for again in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert again == plan
        assert again.fingerprint == plan.fingerprint
        assert again.layers[3].reusing == plan.layers[3].reusing
    hash(plan)


def test_repr_is_short_and_says_where_the_table_is() -> None:
    plan = make_plan(SkipPolicy.from_dict(EXAMPLE), shape(32))
    assert repr(plan).splitlines() == [
        "SkipPlan 'example' of 32 layers:",
        "  image: skip attention in 2, ffn in 10 of 32 layers",
        "  text, generated: skip attention in 2, ffn in 2 of 32 layers",
        "  arrangement parallel: 4 of 32 layers",
        "  arrangement pair: 4 of 32 layers",
        "  router similarity: may skip ffn of text, generated in 8 of 32 layers",
        "  table() shows every layer, cost(n_image, n_text, n_new) what it costs",
    ]
    assert "router" not in repr(plan.when_skipping)
    removal = RemovalRule(3, keep=Keep("random", 0.25))
    other = plan_of(removals=(removal,), masks=(MaskRule(":2", "unimodal"),))
    assert repr(other).splitlines()[1:-1] == [
        "  image: no rule skips",
        "  text, generated: no rule skips",
        "  unimodal masks: 2 of 8 layers",
        "  removal after layer 3: 75% of the image rows leave, by random",
    ]


def test_table() -> None:
    plan = plan_of(
        SkipRule("2:4", IMAGE, "block", "reuse"),
        SkipRule([4], IMAGE, "block", "omit"),
        SkipRule([5], IMAGE, "attention"),
        arrangements=(ArrangementRule([[6, 7]], "pair"),),
        routers=(RouterRule([1], GENERATED, "block", threshold=0.9),),
    )
    assert plan.table().splitlines() == [
        "layers  arrangement  image            text             generated",
        "0       sequential   attention + ffn  attention + ffn  attention + ffn",
        "1       sequential   attention + ffn  attention + ffn  attention? + ffn?",
        "2-3     sequential   copied K, V      attention + ffn  attention + ffn",
        "4       sequential   -                attention + ffn  attention + ffn",
        "5       sequential   own K, V + ffn   attention + ffn  attention + ffn",
        "6-7     pair, sum    attention + ffn  attention + ffn  attention + ffn",
    ]
    assert [row.layers for row in plan.rows()] == ["0", "1", "2-3", "4", "5", "6-7"]


# Hidden states as K and V need multi-head models; the shapes drawn here have fewer heads.
KV_RULES = [kv for kv in SkippedKV if kv is not SkippedKV.HIDDEN]


@st.composite
def skip_plans(draw: st.DrawFn) -> SkipPlan:
    """Plans of 5 layers with one kv a cell: every rule names its own layers."""
    rules = []
    for layer in draw(st.sets(st.integers(0, 4), min_size=1)):
        for token_class in draw(st.sets(st.sampled_from(TokenClass), min_size=1)):
            skip = draw(st.sets(st.sampled_from(Sublayer), min_size=1))
            kv = draw(st.sampled_from(KV_RULES)) if Sublayer.ATTENTION in skip else None
            rules.append(SkipRule([layer], token_class, skip, kv))
    return make_plan(SkipPolicy(tuple(rules)), shape(5))


def simulate(plan: SkipPlan) -> list[dict[TokenClass, int]]:
    """For each layer, class -> the layer that computed its entry; from the rules as written."""
    rules = {(rule.layers[0], c): rule for rule in plan.policy.rules for c in rule.tokens}
    held: list[dict[TokenClass, int]] = []
    for index in range(plan.shape.depth):
        kv = {}
        for c in TokenClass:
            rule = rules.get((index, c))
            if rule is not None and Sublayer.ATTENTION in rule.skip:
                kv[c] = rule.kv
        entries: dict[TokenClass, int] = {}
        for c in TokenClass if len(kv) < len(TokenClass) else ():
            below = [layer[c] for layer in held if c in layer]
            if c not in kv or kv[c] is SkippedKV.PROJECT:
                entries[c] = index
            elif kv[c] is SkippedKV.REUSE and below:
                entries[c] = below[-1]
        held.append(entries)
    return held


@given(skip_plans())
def test_entries_agree_with_a_simulation(plan: SkipPlan) -> None:
    held = simulate(plan)
    for index, (layer, entries) in enumerate(zip(plan.layers, held, strict=True)):
        assert layer.holding == entries.keys()
        assert layer.projecting == {c for c, origin in entries.items() if origin == index}
        for c, cell in layer.cells.items():
            assert (cell.kv is None) == (c in layer.attending)
            assert (cell.kv is SkippedKV.OMIT) == (c not in entries)
            if cell.kv_source is not None:
                assert held[cell.kv_source][c] == entries[c]


def removing(*afters: int, by: str = "attention", **others: Any) -> SkipPolicy:
    rules = (RemovalRule(after, keep=Keep(by, 0.5)) for after in afters)
    return SkipPolicy(removals=tuple(rules), **others)


def test_removals_part_the_layers_into_stages() -> None:
    plan = make_plan(removing(1, 4), shape())
    assert [layer.stage for layer in plan.layers] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert len({layer.table for layer in plan.layers}) == 3
    assert not plan.is_dense and plan.fingerprint != plan_of().fingerprint
    assert "0.25 of the rows" in plan.table()


SKIPPING = {
    "no text": SkipRule([1], [TEXT], "block"),
    "image leaves nothing": SkipRule([1], [IMAGE], "block", "omit"),
}


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (removing(7), "removals[0].after_layer"),
        (removing(1, 9), "removals[1].after_layer"),
        (removing(1, rules=(SKIPPING["no text"],)), "removals[0].keep.by"),
        (removing(1, rules=(SKIPPING["image leaves nothing"],)), "removals[0].keep.by"),
        (removing(0, by="next_attention", rules=(SKIPPING["no text"],)), "removals[0].keep.by"),
        (
            removing(2, by="random", arrangements=(ArrangementRule([[2, 3]], "pair"),)),
            "removals[0].after_layer",
        ),
        (removing(3, arrangements=(ArrangementRule([[2, 3]], "pair"),)), "removals[0].keep.by"),
        (removing(1, masks=(MaskRule([1], "unimodal"),)), "removals[0].keep.by"),
    ],
)
def test_removals_that_do_not_fit(policy: SkipPolicy, field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_plan(policy, shape())
    assert caught.value.field == field


def test_removals_need_images() -> None:
    with pytest.raises(PolicyError, match="text-only"):
        make_plan(removing(1), shape(has_images=False))


@pytest.mark.parametrize(
    ("policy", "affected_classes"),
    [
        (SkipPolicy(), set()),
        (SkipPolicy((SkipRule([1], [GENERATED], "ffn"),)), {GENERATED}),
        (SkipPolicy(routers=(RouterRule([1], [TEXT], "ffn", threshold=0.5),)), {TEXT}),
        (SkipPolicy(arrangements=(ArrangementRule([1], "parallel"),)), EVERY),
        (SkipPolicy(masks=(MaskRule([1], "unimodal"),)), {IMAGE}),
        (removing(1), {IMAGE}),
    ],
)
def test_whom_a_policy_is_about(policy: SkipPolicy, affected_classes: set[TokenClass]) -> None:
    plan = make_plan(policy, shape())
    assert plan.affected_classes == affected_classes
    assert plan.name == ("unnamed" if affected_classes else "dense")
