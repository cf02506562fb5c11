"""Policies: what is accepted, what is refused and how, and that files round-trip."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastskip.policy import (
    Agreement,
    Arrangement,
    ArrangementRule,
    Combine,
    Group,
    Keep,
    MaskRule,
    Measure,
    Norm,
    PolicyError,
    RemovalRule,
    RouterRule,
    Semantics,
    SkippedKV,
    SkipPolicy,
    SkipRule,
    Sublayer,
    TokenClass,
    select_layers,
)

EXAMPLE: dict[str, Any] = {
    "schema_version": 1,
    "name": "example",
    "rules": [
        {"layers": "4:20:2", "tokens": ["image"], "skip": ["ffn"]},
        {"layers": [20, 22], "tokens": "all", "skip": ["attention", "ffn"], "kv": "project"},
    ],
    "arrangements": [
        {"layers": "8:12", "kind": "parallel", "norm": "own"},
        {"layers": [[24, 25], [26, 27]], "kind": "pair", "combine": "sum"},
    ],
    "routers": [
        {
            "layers": "12:20",
            "tokens": ["text", "generated"],
            "skip": ["ffn"],
            "kind": "similarity",
            "threshold": 0.98,
        }
    ],
    "provenance": {},
}


def test_example_parses_into_types() -> None:
    policy = SkipPolicy.from_dict(EXAMPLE)
    assert policy.rules[0] == SkipRule("4:20:2", TokenClass.IMAGE, Sublayer.FFN)
    assert policy.rules[1].kv is SkippedKV.PROJECT
    assert policy.arrangements[0].norm is Norm.OWN
    assert policy.arrangements[1].combine is Combine.SUM
    assert policy.arrangements[1].kind is Arrangement.PAIR
    assert policy.routers[0].threshold == 0.98
    assert policy.to_dict() == EXAMPLE


def test_friendly_input_is_one_form() -> None:
    rule = SkipRule([4, 6], ["image", TokenClass.TEXT], "block", "omit")
    assert rule.layers == (4, 6)
    assert rule.tokens == frozenset({TokenClass.IMAGE, TokenClass.TEXT})
    assert rule.skip == frozenset(Sublayer)
    assert rule.kv is SkippedKV.OMIT
    assert rule == SkipRule(range(4, 7, 2), {"text", "image"}, ["attention", "ffn"], SkippedKV.OMIT)


def test_equality_is_as_written_and_ignores_names() -> None:
    rule = SkipRule("0:2", "all", "ffn")
    assert SkipPolicy((rule,), name="a") == SkipPolicy((rule,), name="b", provenance={"by": "me"})
    assert rule != SkipRule((0, 1), "all", "ffn")
    assert rule != SkipRule("0:2", list(TokenClass), "ffn")
    assert SkipRule(":", skip="block") != SkipRule(":", skip="block", kv="project")
    assert hash(SkipPolicy((rule,), name="a")) == hash(SkipPolicy((rule,), name="b"))
    assert SkipPolicy() == SkipPolicy.from_dict({"schema_version": 1})


def test_policies_are_immutable_and_copyable() -> None:
    policy = SkipPolicy.from_dict(EXAMPLE)
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)
    with pytest.raises(AttributeError):
        policy.rules[0].kv = SkippedKV.OMIT  # type: ignore[misc]
    with pytest.raises(AttributeError):
        policy.name = "other"  # type: ignore[misc]


def changed(path: str, value: object) -> dict[str, Any]:
    """The example with one value replaced; `path` is like "rules/1/layers"."""
    document = copy.deepcopy(EXAMPLE)
    *parents, last = path.split("/")
    place: Any = document
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    return document


THRESHOLD = "routers[0].threshold"


def router(kind: str, tokens: Any = ("text",), **fields: Any) -> dict[str, Any]:
    """A router rule; not a valid one by itself."""
    return {"layers": ":", "tokens": tokens, "skip": ["ffn"], "kind": kind} | fields


def removal(**fields: Any) -> dict[str, Any]:
    """A removal rule, with some fields in another form."""
    return {"after_layer": 2, "keep": keep()} | fields


def keep(by: str = "attention", ratio: float = 0.5) -> dict[str, Any]:
    return {"by": by, "ratio": ratio}


MALFORMED: list[tuple[str, object, str, str]] = [
    # path, value, field named by the error, part of what it says is allowed
    ("schema_version", 2, "schema_version", "1"),
    ("schema_version", 0, "schema_version", "1"),
    ("schema_version", "1", "schema_version", "1"),
    ("schema_version", True, "schema_version", "1"),
    ("name", 3, "name", "string"),
    ("provenance", [], "provenance", "object"),
    ("provenance", {"x": math.nan}, "provenance", "JSON"),
    ("provenance", {"x": {1, 2}}, "provenance", "JSON"),
    ("rule", [], "rule", '"rules"'),
    ("rules", {}, "rules", "list"),
    ("rules", None, "rules", "list"),
    ("rules", "4:8", "rules", "list"),
    ("rules", ["4:8"], "rules[0]", '"layers"'),
    ("rules", [{"skip": ["ffn"]}], "rules[0].layers", "value"),
    ("rules", [{"layers": ":"}], "rules[0].skip", "value"),
    ("rules/0/keep", 1, "rules[0].keep", '"kv"'),
    ("rules/1/layers", "4-8", "rules[1].layers", "slice"),
    ("rules/1/layers", "4", "rules[1].layers", "slice"),
    ("rules/1/layers", "", "rules[1].layers", "slice"),
    ("rules/1/layers", "1:2:0", "rules[1].layers", "step >= 1"),
    ("rules/1/layers", "8:1:-1", "rules[1].layers", "step >= 1"),
    ("rules/1/layers", "1:2:3:4", "rules[1].layers", "slice"),
    ("rules/1/layers", "٣:٤", "rules[1].layers", "slice"),
    ("rules/1/layers", "9" * 5000 + ":", "rules[1].layers", "slice"),
    ("rules/1/layers", [], "rules[1].layers", "list"),
    ("rules/1/layers", 4, "rules[1].layers", "list"),
    ("rules/1/layers", None, "rules[1].layers", "list"),
    ("rules/1/layers", [True], "rules[1].layers", "integers"),
    ("rules/1/layers", [1.0], "rules[1].layers", "integers"),
    ("rules/1/layers", ["1"], "rules[1].layers", "integers"),
    ("rules/1/layers", [-1], "rules[1].layers", "from 0"),
    ("rules/1/layers", [[1, 2]], "rules[1].layers", "integers"),
    ("rules/1/layers", [3, 3], "rules[1].layers", "once"),
    ("rules/0/tokens", "images", "rules[0].tokens", '"image"'),
    ("rules/0/tokens", [], "rules[0].tokens", '"generated"'),
    ("rules/0/tokens", ["image", "all"], "rules[0].tokens", '"text"'),
    ("rules/0/tokens", [["image"]], "rules[0].tokens", '"text"'),
    ("rules/0/tokens", None, "rules[0].tokens", '"all"'),
    ("rules/0/tokens", {"image": 1}, "rules[0].tokens", '"all"'),
    ("rules/0/skip", [], "rules[0].skip", '"attention"'),
    ("rules/0/skip", "mlp", "rules[0].skip", '"ffn"'),
    ("rules/0/skip", ["block", "mlp"], "rules[0].skip", '"ffn"'),
    ("rules/0/skip", [["block"]], "rules[0].skip", '"ffn"'),
    ("rules/0/skip", 1, "rules[0].skip", '"block"'),
    ("rules/0/kv", "project", "rules[0].kv", "attention"),
    ("rules/1/kv", "keep", "rules[1].kv", '"omit"'),
    ("rules/1/kv", ["omit"], "rules[1].kv", '"omit"'),
    ("arrangements/0/kind", "sequential", "arrangements[0].kind", '"pair"'),
    ("arrangements/0/kind", None, "arrangements[0].kind", '"parallel"'),
    ("arrangements/0/norm", "both", "arrangements[0].norm", '"shared"'),
    ("arrangements/0/combine", "sum", "arrangements[0].combine", "pair"),
    ("arrangements/0/layers", [[1, 2]], "arrangements[0].layers", "list"),
    ("arrangements/0/order", 1, "arrangements[0].order", '"combine"'),
    ("arrangements/1/norm", "own", "arrangements[1].norm", "parallel"),
    ("arrangements/1/combine", "max", "arrangements[1].combine", '"mean"'),
    ("arrangements/1/layers", [24, 25], "arrangements[1].layers", "pairs"),
    ("arrangements/1/layers", [[24, 26]], "arrangements[1].layers", "[l, l + 1]"),
    ("arrangements/1/layers", [[25, 24]], "arrangements[1].layers", "[l, l + 1]"),
    ("arrangements/1/layers", [[24, 25, 26]], "arrangements[1].layers", "[l, l + 1]"),
    ("arrangements/1/layers", [[-1, 0]], "arrangements[1].layers", "[l, l + 1]"),
    ("arrangements/1/layers", [[False, True]], "arrangements[1].layers", "[l, l + 1]"),
    ("arrangements/1/layers", [[4, 5], [5, 6]], "arrangements[1].layers", "one pair"),
    ("arrangements/1/layers", [], "arrangements[1].layers", "pairs"),
    ("arrangements/1/layers", "0:8:2", "arrangements[1].layers", "step 1"),
    ("routers/0/kind", "entropy", "routers[0].kind", '"similarity"'),
    ("routers/0/kind", ["similarity"], "routers[0].kind", '"similarity"'),
    ("routers/0/threshold", math.nan, "routers[0].threshold", "number"),
    ("routers/0/threshold", math.inf, "routers[0].threshold", "number"),
    ("routers/0/threshold", 10**400, "routers[0].threshold", "[-1, 1]"),
    ("routers/0/threshold", 1.5, "routers[0].threshold", "[-1, 1]"),
    ("routers/0/threshold", True, "routers[0].threshold", "number"),
    ("routers/0/threshold", "0.9", "routers[0].threshold", "number"),
    ("routers/0/threshold", None, "routers[0].threshold", "[-1, 1]"),
    ("routers/0/top_k", 1, "routers[0].top_k", '"threshold"'),
    ("routers/0/group", "all", "routers[0].group", '"sequence"'),
    ("routers/0/group", 1, "routers[0].group", '"batch"'),
    ("routers/0/agree", "most", "routers[0].agree", '"any"'),
    ("routers/0/agree", "any", "routers[0].agree", 'group "sequence"'),
    ("routers/0/measure", "angle", "routers[0].measure", '"change"'),
    ("routers/0/kv", "reuse", "routers[0].kv", '"attention"'),
    *(
        (f"routers/0/{name}", value, f"routers[0].{name}", 'for kind "similarity"')
        for name, value in (("rate", 0.5), ("capacity", 0.5), ("seed", 1), ("weights", "w"))
    ),
    ("routers/0/options", {}, "routers[0].options", "plug-in"),
    ("routers", [router("similarity", threshold=-0.1, measure="change")], THRESHOLD, "[0, inf)"),
    ("routers", [router("random")], "routers[0].rate", "[0, 1]"),
    ("routers", [router("random", rate=10**400)], "routers[0].rate", "[0, 1]"),
    ("routers", [router("random", rate=1.01)], "routers[0].rate", "[0, 1]"),
    ("routers", [router("random", rate=0.5, seed=-1)], "routers[0].seed", "integer"),
    ("routers", [router("random", rate=0.5, seed=1.0)], "routers[0].seed", "integer"),
    ("routers", [router("random", rate=0.5, threshold=1)], THRESHOLD, '"rate"'),
    ("routers", [router("linear", threshold=0)], "routers[0].weights", "safetensors"),
    ("routers", [router("linear", weights="\udcff", threshold=0)], "routers[0].weights", "Unicode"),
    ("routers", [router("linear", weights="w")], THRESHOLD, "or a capacity"),
    ("routers", [router("linear", weights="w", threshold=0, capacity=1)], THRESHOLD, "either"),
    ("routers", [router("linear", weights="w", threshold=math.inf)], THRESHOLD, "finite"),
    ("routers", [router("linear", weights="w", threshold=-(10**400))], THRESHOLD, "finite"),
    ("routers", [router("linear", weights="w", capacity=0)], "routers[0].capacity", "(0, 1]"),
    ("routers", [router("linear", weights="w", capacity=1.1)], "routers[0].capacity", "(0, 1]"),
    (
        "routers",
        [router("linear", weights="w", capacity=0.5, group="batch")],
        "routers[0].group",
        "no group",
    ),
    (
        "routers",
        [router("linear", weights="w", capacity=0.5, tokens="all")],
        "routers[0].tokens",
        '"image", "text"',
    ),
    ("routers", [router("acme.own", group="batch")], "routers[0].group", "options"),
    ("routers", [router("acme.")], "routers[0].kind", "plug-in"),
    (
        "routers",
        [{"layers": ":", "skip": ["ffn"], "kind": "similarity"}],
        "routers[0].threshold",
        "",
    ),
    ("removals", [{"after_layer": 2}], "removals[0].keep", "a value"),
    ("removals", "none", "removals", "list"),
    ("removals", [removal(after_layer=-1)], "removals[0].after_layer", ">= 0"),
    ("removals", [removal(after_layer=True)], "removals[0].after_layer", ">= 0"),
    ("removals", [removal(tokens="all")], "removals[0].tokens", '"image"'),
    ("removals", [removal(tokens=["text"])], "removals[0].tokens", '"image"'),
    ("removals", [removal(keep=0.5)], "removals[0].keep", "by"),
    ("removals", [removal(keep={"by": "random"})], "removals[0].keep.ratio", "a value"),
    ("removals", [removal(keep={"by": "luck", "ratio": 0})], "removals[0].keep.by", "spacing"),
    ("removals", [removal(keep={"by": "random", "ratio": 1})], "removals[0].keep.ratio", "[0, 1)"),
    (
        "removals",
        [removal(keep={"by": "random", "ratio": 10**5000})],
        "removals[0].keep.ratio",
        "[",
    ),
    (
        "removals",
        [removal(keep={"by": "random", "ratio": math.nan})],
        "removals[0].keep.ratio",
        "[0",
    ),
    (
        "removals",
        [removal(keep={"by": "random", "ratio": 0.5, "rows": 3})],
        "removals[0].keep.rows",
        "ratio",
    ),
    ("removals", [removal(seed=1)], "removals[0].seed", "random"),
    (
        "removals",
        [removal(keep={"by": "random", "ratio": 0.5}, seed=-1)],
        "removals[0].seed",
        "integer",
    ),
    ("removals", [removal(), removal()], "removals[1].after_layer", "ascending order"),
    ("removals", [removal()], "removals", "none together with routers"),
    ("masks", [{"layers": ":", "kind": "bimodal"}], "masks[0].kind", "unimodal"),
    ("masks", [{"kind": "unimodal"}], "masks[0].layers", "a value"),
    ("masks", "none", "masks", "list"),
    ("name", "a\ud800b", "name", "Unicode"),
    ("provenance", {"a": "\ud800"}, "provenance", "JSON"),
    ("semantics", "exact", "semantics", "reference"),
    ("semantics", None, "semantics", "clean"),
    ("arrangements/0/tokens", ["words"], "arrangements[0].tokens", "generated"),
]


@pytest.mark.parametrize(("path", "value", "field", "allowed"), MALFORMED)
def test_malformed(path: str, value: object, field: str, allowed: str) -> None:
    with pytest.raises(PolicyError) as caught:
        SkipPolicy.from_dict(changed(path, value))
    error = caught.value
    assert error.field == field
    assert allowed in error.allowed
    assert error.field in str(error) and error.allowed in str(error)
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_newer_and_missing_say_so() -> None:
    with pytest.raises(PolicyError, match="newer"):
        SkipPolicy.from_dict(changed("schema_version", 7))
    with pytest.raises(PolicyError, match="schema_version: is missing"):
        SkipPolicy.from_dict({"rules": []})
    with pytest.raises(PolicyError, match="an object"):
        SkipPolicy.from_dict([EXAMPLE])  # type: ignore[arg-type]


def test_constructor_refuses_other_types() -> None:
    with pytest.raises(PolicyError) as caught:
        SkipPolicy(rules=({"layers": ":"},))  # type: ignore[arg-type]
    assert caught.value.field == "rules[0]"
    with pytest.raises(PolicyError, match="routers"):
        SkipPolicy(routers=RouterRule(":", skip="ffn", threshold=0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".JSON"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    policy = SkipPolicy.from_dict(EXAMPLE | {"provenance": {"größe": [1, {"a": None}]}})
    path = tmp_path / f"policy{suffix}"
    policy.save(path)
    again = SkipPolicy.from_file(path)
    assert again == policy
    assert (again.name, again.provenance) == (policy.name, policy.provenance)
    assert SkipPolicy.coerce(path) == SkipPolicy.coerce(str(path)) == policy


def test_yaml_slice_needs_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("schema_version: 1\nrules:\n- {layers: 4:20:2, skip: [ffn]}\n")
    assert SkipPolicy.from_file(path).rules == (SkipRule("4:20:2", skip="ffn"),)


def test_yaml_numbers_need_no_point(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    rule = "{layers: ':', skip: [ffn], kind: similarity, measure: change, threshold: %s}"
    for text in ("1e-3", "1E-3", "+.1e-2", "1.e-3", "1.0e-3"):
        path.write_text(f"schema_version: 1\nrouters:\n- {rule % text}\n")
        assert SkipPolicy.from_file(path).routers[0].threshold == 1e-3
    # and a text stays one, also where it looks like such a number
    named = SkipPolicy(name="1e-3", provenance={"a": "1e3", "b": 1e-07})
    named.save(path)
    again = SkipPolicy.from_file(path)
    assert (again.name, again.provenance) == (named.name, named.provenance)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nschema_version: 1\nprovenance: {c: [*b, *b]}\n"
BROKEN: list[tuple[str, bytes, str]] = [
    ("p.json", b"", "not JSON"),
    ("p.json", b"{", "not JSON"),
    ("p.json", b"[1]", "got"),
    ("p.json", b"3", "got"),
    ("p.json", b'{"schema_version": 1, "schema_version": 1}', "duplicate key 'schema_version'"),
    ("p.json", b'{"schema_version": 1, "provenance": {"a": 1, "a": 2}}', "duplicate key 'a'"),
    ("p.json", b"\xff\xfe{}", "UTF-8"),
    ("p.json", b"[" * 100_000, "nested"),
    ("p.json", b" " * (1 << 20) + b"{}", "at most"),
    ("p.json", b'{"schema_version": ' + b"1" * 5000 + b"}", "digits"),
    ("p.yaml", b"schema_version: 1\nschema_version: 1\n", "duplicate key"),
    ("p.yaml", b"schema_version: 1\nprovenance: {a: 1, a: 2}\n", "duplicate key 'a'"),
    ("p.yaml", b"schema_version: [1\n", "not YAML"),
    ("p.yaml", b"1: 2\n", "strings"),
    ("p.yaml", b"schema_version: 1\n---\nschema_version: 1\n", "not YAML"),
    ("p.yaml", b"!!python/object/apply:os.getcwd []\n", "not YAML"),
    ("p.yaml", b"", "got None"),
    ("p.yaml", b"[" * 100_000, "nested"),
    ("p.yaml", LAUGHS.encode(), "aliases"),
    ("p.yaml", b"schema_version: 1\nprovenance: {at: 2024-01-01}\n", "JSON"),
    ("p.toml", b"schema_version = 1", "suffix"),
    ("p", b"{}", "suffix"),
]


@pytest.mark.parametrize(("name", "data", "problem"), BROKEN)
def test_broken_files(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PolicyError, match=problem):
        SkipPolicy.from_file(path)


def test_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SkipPolicy.from_file(tmp_path / "none.json")
    with pytest.raises(PolicyError, match=r"\.yaml"):
        SkipPolicy().save(tmp_path / "policy.txt")


def test_a_file_stays_whole_until_the_next_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "policy.json", tmp_path / "link.json"
    SkipPolicy(name="old").save(path)
    link.symlink_to(path)
    rule = RouterRule(":", skip="ffn", kind="linear", weights="w.safetensors", threshold=0)
    with pytest.raises(PolicyError, match="surrogates not allowed"):
        SkipPolicy(routers=(rule,), folder="/no text: \udcff").save(path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr("fastskip.atomic_files.os.replace", _fail)
        SkipPolicy(name="new").save(path)
    assert SkipPolicy.from_file(path).name == "old"
    SkipPolicy(name="new").save(link)
    assert link.is_symlink() and SkipPolicy.from_file(path).name == "new"
    assert {file.name for file in tmp_path.iterdir()} == {"policy.json", "link.json"}


def _fail(*paths: object) -> None:
    raise OSError("the disk is full")


def test_coerce() -> None:
    policy = SkipPolicy.from_dict(EXAMPLE)
    assert SkipPolicy.coerce(policy) is policy
    assert SkipPolicy.coerce(EXAMPLE) == policy
    assert SkipPolicy.coerce("frozen_visual") == SkipPolicy.preset("frozen_visual")
    text = "paper/skip-ffn:interval=4,3,2,2:depth=32:scope=image"
    options = {"interval": "4,3,2,2", "depth": 32, "scope": "image"}
    made = SkipPolicy.preset("paper/skip-ffn", **options)
    assert SkipPolicy.coerce(text) == replace(made, name=text)
    wrong: list[Any] = ["frozen", "no/such/file.json", "x" * 10_000, "a\0b", "", 3, None]
    for value in wrong:
        with pytest.raises(PolicyError, match="frozen_visual") as caught:
            SkipPolicy.coerce(value)
        assert caught.value.field == "policy"


def test_repr_shows_rules_as_a_file_has_them() -> None:
    lines = repr(SkipPolicy.from_dict(EXAMPLE)).splitlines()
    assert lines[0] == "SkipPolicy 'example':"
    for line in lines[1:]:
        key, _, rule = line.strip().partition(": ")
        assert json.loads(rule) in EXAMPLE[key]
    assert len(lines) == 6
    assert repr(SkipPolicy()) == "SkipPolicy: dense"
    assert "semantics: reference" in repr(SkipPolicy(semantics=Semantics.REFERENCE))


def test_repr_stays_short() -> None:
    rules = [SkipRule(list(range(n, 100)), "all", ["ffn"]) for n in range(40)]
    policy = SkipPolicy(tuple(rules), provenance={"found": list(range(1000))})
    assert len(repr(policy)) < 2000
    assert repr(policy).endswith("and 30 more; to_dict() has all")


def test_misspelt_presets_are_recognised() -> None:
    hint = r" \(did you mean image_ffn\?\); allowed: "
    with pytest.raises(
        PolicyError, match="^policy: got 'image_fnn:end=4', no such .* preset" + hint
    ):
        SkipPolicy.coerce("image_fnn:end=4")
    with pytest.raises(PolicyError, match="^preset: got 'imageffn'" + hint):
        SkipPolicy.preset("imageffn")
    with pytest.raises(PolicyError, match="^policy: got 'policy.json', no such file or preset; "):
        SkipPolicy.coerce("policy.json")


LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (":", tuple(range(8))),
    ("4:7:2", (4, 6)),
    ("2:", (2, 3, 4, 5, 6, 7)),
    (":-6", (0, 1)),
    ("-1:", (7,)),
    ("-8:8:7", (0, 7)),
    ("::3", (0, 3, 6)),
    ((5, 1), (5, 1)),
]


@pytest.mark.parametrize(("selection", "layers"), LAYERS)
def test_select_layers(selection: Any, layers: tuple[int, ...]) -> None:
    assert select_layers(selection, 8, "layers") == layers


@pytest.mark.parametrize("selection", ["0:9", "-9:", "9:", "4:4", "5:4", "8:", (8,), "x"])
def test_select_layers_out_of_bounds(selection: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        select_layers(selection, 8, "rules[3].layers")
    assert caught.value.field == "rules[3].layers"


layer_lists = st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True)
slices = st.tuples(*[st.none() | st.integers(-40, 40)] * 2, st.none() | st.integers(1, 9)).map(
    lambda parts: ":".join("" if part is None else str(part) for part in parts)
)
tokens = st.just("all") | st.sets(st.sampled_from(TokenClass), min_size=1)
skips = st.sets(st.sampled_from(Sublayer), min_size=1)


@st.composite
def rules(draw: st.DrawFn) -> SkipRule:
    skip = draw(skips)
    kv = draw(st.none() | st.sampled_from(SkippedKV)) if Sublayer.ATTENTION in skip else None
    return SkipRule(draw(layer_lists | slices), draw(tokens), skip, kv)


parallels = st.builds(
    ArrangementRule,
    layer_lists | slices,
    st.just("parallel"),
    norm=st.none() | st.sampled_from(Norm),
    tokens=tokens,
)
similarity = st.builds(
    RouterRule,
    layer_lists | slices,
    tokens,
    skips,
    threshold=st.floats(0, 1, allow_nan=False),
    measure=st.none() | st.sampled_from(Measure),
    group=st.none() | st.sampled_from(Group),
)
draws = st.builds(
    RouterRule,
    layer_lists | slices,
    tokens,
    skips,
    st.just("random"),
    rate=st.floats(0, 1),
    seed=st.none() | st.integers(0, 9),
    group=st.sampled_from([Group.SEQUENCE, Group.BATCH]),
    agree=st.none() | st.sampled_from(Agreement),
)
plug_ins = st.builds(
    RouterRule,
    layer_lists | slices,
    tokens,
    st.just("block"),
    st.just("acme.own"),
    kv=st.none() | st.sampled_from(SkippedKV),
    options=st.none() | st.dictionaries(st.text(max_size=3), st.integers()),
)
routers = similarity | draws | plug_ins
policies = st.builds(
    SkipPolicy,
    rules=st.lists(rules(), max_size=3),
    arrangements=st.lists(parallels, max_size=2),
    routers=st.lists(routers, max_size=2),
    masks=st.lists(st.builds(MaskRule, layer_lists | slices, st.just("unimodal")), max_size=1),
    semantics=st.sampled_from(Semantics),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)


@given(policies)
def test_any_policy_round_trips_through_json(policy: SkipPolicy) -> None:
    document = json.loads(json.dumps(policy.to_dict()))
    again = SkipPolicy.from_dict(document)
    assert again == policy
    assert again.to_dict() == document


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 40)
    | st.floats()
    | st.sampled_from(["all", ":", "ffn"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(EXAMPLE)), inner)
    ),
    max_leaves=5,
)


@given(st.sampled_from([path for path, *_ in MALFORMED]), json_values)
def test_any_value_parses_or_raises_policy_error(path: str, value: object) -> None:
    try:
        SkipPolicy.from_dict(changed(path, value))
    except PolicyError as error:
        assert error.field


def test_removals_round_trip() -> None:
    document = {
        "schema_version": 1,
        "removals": [
            {"after_layer": 1, "tokens": ["image"], "keep": {"by": "attention", "ratio": 0.5}},
            {
                "after_layer": 4,
                "tokens": ["image"],
                "keep": {"by": "random", "ratio": 0.0},
                "seed": 3,
            },
        ],
    }
    policy = SkipPolicy.from_dict(document)
    assert policy.to_dict()["removals"] == document["removals"]
    assert SkipPolicy.from_dict(policy.to_dict()) == policy != SkipPolicy()
    assert "removals" not in SkipPolicy().to_dict()
    assert policy.removals[0].keep.count(9) == 4
    # 0.29 * 100 is a little less than 29 in binary
    assert Keep("spacing", 0.29).count(100) == 29


def test_removals_and_the_semantics_of_the_papers() -> None:
    with pytest.raises(PolicyError, match="none together with semantics"):
        SkipPolicy(
            removals=(RemovalRule(1, keep=keep("spacing")),),
            semantics=Semantics.REFERENCE,
        )
