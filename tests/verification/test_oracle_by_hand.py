"""The oracle's logits against matrices, for every cell kind; expectations are written out."""

from typing import Any

import pytest
import torch

from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from fastskip.verification.oracle import MaskedOracle
from tests.budget import truth_copy
from tests.models import tiny_llama, tiny_llava
from tests.verification.by_hand import Layer, logits_by_hand

IDS = [5, 9, 17, 3, 40, 8]
CLASSES = [TEXT, IMAGE, IMAGE, TEXT, GENERATED, GENERATED]
ALL = (0, 1, 2, 3, 4, 5)
TEXT_AND_NEW = (0, 3, 4, 5)
IMAGES = (1, 2)


def entries(origin: int, rows: tuple[int, ...] = ALL) -> dict[int, int]:
    return dict.fromkeys(rows, origin)


def dense(index: int) -> Layer:
    return Layer(ALL, ALL, entries(index))


def skip(layers: Any, tokens: Any, *what: str, **kv: str) -> dict[str, Any]:
    return {"layers": layers, "tokens": tokens, "skip": list(what), **kv}


def arrange(layers: Any, kind: str, **options: str) -> dict[str, Any]:
    return {"layers": layers, "kind": kind, **options}


CASES: dict[str, tuple[dict[str, Any], list[Layer]]] = {
    "dense": ({}, [dense(0), dense(1), dense(2)]),
    "skip ffn": (
        {"rules": [skip([1], ["image"], "ffn")]},
        [dense(0), Layer(ALL, TEXT_AND_NEW, entries(1)), dense(2)],
    ),
    "skip attention, project": (
        {"rules": [skip([1], ["image"], "attention")]},
        [dense(0), Layer(TEXT_AND_NEW, ALL, entries(1)), dense(2)],
    ),
    "skip attention, omit": (
        {"rules": [skip([1], ["image"], "attention", kv="omit")]},
        [dense(0), Layer(TEXT_AND_NEW, ALL, entries(1, TEXT_AND_NEW)), dense(2)],
    ),
    "skip attention, reuse": (
        {"rules": [skip([1], ["image"], "attention", kv="reuse")]},
        [
            dense(0),
            Layer(TEXT_AND_NEW, ALL, entries(1, TEXT_AND_NEW) | entries(0, IMAGES)),
            dense(2),
        ],
    ),
    "reuse in layer 0 is omit": (
        {"rules": [skip([0], ["image"], "attention", kv="reuse")]},
        [Layer(TEXT_AND_NEW, ALL, entries(0, TEXT_AND_NEW)), dense(1), dense(2)],
    ),
    "reuse goes down through reuse": (
        {"rules": [skip("1:", ["image"], "block", kv="reuse")]},
        [
            dense(0),
            Layer(TEXT_AND_NEW, TEXT_AND_NEW, entries(1, TEXT_AND_NEW) | entries(0, IMAGES)),
            Layer(TEXT_AND_NEW, TEXT_AND_NEW, entries(2, TEXT_AND_NEW) | entries(0, IMAGES)),
        ],
    ),
    "reuse passes over an omitted entry": (
        {
            "rules": [
                skip([1], ["image"], "attention", kv="omit"),
                skip([2], ["image"], "attention", kv="reuse"),
            ]
        },
        [
            dense(0),
            Layer(TEXT_AND_NEW, ALL, entries(1, TEXT_AND_NEW)),
            Layer(TEXT_AND_NEW, ALL, entries(2, TEXT_AND_NEW) | entries(0, IMAGES)),
        ],
    ),
    "reuse passes over a layer where nobody attends": (
        {
            "rules": [
                skip([1], "all", "attention", kv="project"),
                skip([2], ["generated"], "attention", kv="reuse"),
            ]
        },
        [
            dense(0),
            Layer((), ALL, {}),
            Layer((0, 1, 2, 3), ALL, entries(2, (0, 1, 2, 3)) | entries(0, (4, 5))),
        ],
    ),
    "reuse of projected entries": (
        {
            "rules": [
                skip([0], ["text"], "attention"),
                skip([1], ["text"], "attention", kv="reuse"),
            ]
        },
        [
            Layer((1, 2, 4, 5), ALL, entries(0)),
            Layer((1, 2, 4, 5), ALL, entries(1, (1, 2, 4, 5)) | entries(0, (0, 3))),
            dense(2),
        ],
    ),
    "nobody attends in layer 0": (
        {"rules": [skip([0], "all", "attention")]},
        [Layer((), ALL, {}), dense(1), dense(2)],
    ),
    "skip both, rules add up": (
        {
            "rules": [
                skip("0:2", ["generated"], "attention", kv="omit"),
                skip([1], ["generated", "text"], "ffn"),
            ]
        },
        [
            Layer((0, 1, 2, 3), ALL, entries(0, (0, 1, 2, 3))),
            Layer((0, 1, 2, 3), IMAGES, entries(1, (0, 1, 2, 3))),
            dense(2),
        ],
    ),
    "parallel, own norm": (
        {"arrangements": [arrange("1:", "parallel", norm="own")]},
        [dense(0), Layer(ALL, ALL, entries(1), "own"), Layer(ALL, ALL, entries(2), "own")],
    ),
    "parallel, shared norm": (
        {"arrangements": [arrange([1], "parallel", norm="shared")]},
        [dense(0), Layer(ALL, ALL, entries(1), "shared"), dense(2)],
    ),
    "parallel with skipped branches": (
        {
            "rules": [skip([1], ["image"], "attention"), skip([1], ["text"], "ffn")],
            "arrangements": [arrange([1], "parallel")],
        },
        [dense(0), Layer(TEXT_AND_NEW, (1, 2, 4, 5), entries(1), "own"), dense(2)],
    ),
    "pair, sum": (
        {"arrangements": [arrange([[0, 1]], "pair", combine="sum")]},
        [dense(0), Layer(ALL, ALL, entries(1), joins="sum"), dense(2)],
    ),
    "pair, mean": (
        {"arrangements": [arrange([[1, 2]], "pair", combine="mean")]},
        [dense(0), dense(1), Layer(ALL, ALL, entries(2), joins="mean")],
    ),
    "pair from a slice, reuse above it": (
        {
            "rules": [skip([2], ["image"], "attention", kv="reuse")],
            "arrangements": [arrange("0:2", "pair")],
        },
        [
            dense(0),
            Layer(ALL, ALL, entries(1), joins="sum"),
            Layer(TEXT_AND_NEW, ALL, entries(2, TEXT_AND_NEW) | entries(1, IMAGES)),
        ],
    ),
}


def assert_same(oracle: torch.Tensor, hand: torch.Tensor) -> None:
    # The model's rotary frequencies are fp32 numbers, the matrices' are not.
    torch.testing.assert_close(oracle, hand, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def model() -> Any:
    return truth_copy(tiny_llava(depth=3))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_matrices(model: Any, case: str) -> None:
    policy, layers = CASES[case]
    with MaskedOracle(model, policy) as oracle, torch.no_grad():
        logits = oracle.forward(torch.tensor([IDS]), token_classes=torch.tensor([CLASSES]))
    assert_same(logits[0], logits_by_hand(model, IDS, layers))


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"dense"}))
def test_every_case_differs_from_dense(model: Any, case: str) -> None:
    plain, changed = (logits_by_hand(model, IDS, CASES[name][1]) for name in ("dense", case))
    assert (plain - changed)[-1].abs().max() > 1e-2


def test_decisions_are_those_of_the_matrices(model: Any) -> None:
    """Rows of one class that differ: each router's rows leave what its rule says."""
    head = {"kind": "random", "rate": 0.5, "layers": [1]}
    policy = {
        "routers": [
            head | {"tokens": ["image"], "skip": ["attention"], "kv": "omit"},
            head | {"tokens": ["text"], "skip": ["block"], "kv": "reuse"},
            head | {"tokens": ["generated"], "skip": ["ffn"]},
            head | {"tokens": ["image"], "skip": ["attention"], "kv": "reuse", "layers": [2]},
        ]
    }
    decisions = {
        (1, "attention"): torch.tensor([[1, 1, 0, 0, 0, 0]]).bool(),
        (1, "ffn"): torch.tensor([[1, 0, 0, 0, 0, 1]]).bool(),
        (2, "attention"): torch.tensor([[0, 1, 1, 0, 0, 0]]).bool(),
    }
    layers = [
        dense(0),
        Layer((2, 3, 4, 5), (1, 2, 3, 4), entries(1, (2, 3, 4, 5)) | {0: 0}),
        # Row 1 left nothing in layer 1, so it copies from layer 0.
        Layer((0, 3, 4, 5), ALL, entries(2, (0, 3, 4, 5)) | {1: 0, 2: 1}),
    ]
    with MaskedOracle(model, policy, decisions) as oracle, torch.no_grad():
        logits = oracle.forward(torch.tensor([IDS]), token_classes=torch.tensor([CLASSES]))
    assert_same(logits[0], logits_by_hand(model, IDS, layers))


def test_text_only_model_has_two_classes() -> None:
    """In a text-only model a layer that text and generated tokens leave out holds nothing."""
    model = truth_copy(tiny_llama(depth=2))
    policy = {
        "rules": [
            skip([0], ["text", "generated"], "attention"),
            skip([1], ["generated"], "attention", kv="reuse"),
        ]
    }
    layers = [Layer((), ALL, {}), Layer((0, 1, 2), ALL, entries(1, (0, 1, 2)))]
    classes = torch.tensor([[TEXT] * 3 + [GENERATED] * 3])
    with MaskedOracle(model, policy) as oracle, torch.no_grad():
        logits = oracle.forward(torch.tensor([IDS]), token_classes=classes)
    assert_same(logits[0], logits_by_hand(model, IDS, layers))
