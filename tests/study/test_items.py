"""Metrics on known answers, and files of items."""

import json
from pathlib import Path

import pytest

from fastskip.study.items import Item, ItemError, read_items
from fastskip.study.metrics import Metric, words


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("yes", ("yes",), 1),
        ("Yes.", ("yes",), 1),
        ("the  red", ("red",), 1),
        ("no", ("yes", "no"), 1),
        ("", ("yes",), 0),
        ("yes yes", ("yes",), 0),
        ("row one", ("row two",), 0),
    ],
)
def test_exact_match(answer: str, references: tuple[str, ...], score: float) -> None:
    assert Metric.EXACT.score(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("a red circle and a blue square", 1),
        ("A blue square, a red circle.", 1),
        ("a red circle", 2 / 3),
        ("a red circle and a red circle", 1 / 2),
        ("a blue circle and a red square", 0),
        ("a red circle and a blue square and a green cross", 4 / 5),
        ("", 0),
        ("and and", 0),
    ],
)
def test_caption_match(answer: str, score: float) -> None:
    found = Metric.CAPTION.score(answer, ("a red circle and a blue square",))
    assert found == pytest.approx(score)


def test_caption_match_takes_the_best_reference() -> None:
    assert Metric.CAPTION.score("a sandy beach", ("a band", "the sandy beach")) == 1
    assert words("A band, and THE end!") == "band and end"


def test_read_items(tmp_path: Path) -> None:
    lines = [
        {"question": "is it red?", "answer": "yes", "image": "a.png"},
        {"question": "describe", "answer": ["a", "red circle"][1:], "kind": "long"}
        | {"metric": "caption"},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = read_items(path)
    assert first.image == tmp_path / "a.png" and first.metric is Metric.EXACT
    assert (first.kind, first.references, first.where) == ("question", ("yes",), f"{path}, line 1")
    assert (second.kind, second.image, second.metric) == ("long", None, Metric.CAPTION)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", r"line 1: got \[1\]"),
        ('{"question": "a?", "answer": "b", "extra": 1}', "unknown field 'extra'"),
        ('{"question": "a?"}', "answer is None"),
        ('{"question": "a?", "answer": [1]}', r"answer is \[1\]"),
        ('{"question": "a?", "answer": []}', r"answer is \(\)"),
        ('{"question": " ", "answer": "b"}', "question is ' '"),
        ('{"question": "a?", "answer": "b", "metric": "bleu"}', "allowed: exact, caption"),
        ('{"question": "a?", "answer": "b", "image": 1}', "image is 1"),
        ("", "no items"),
    ],
)
def test_bad_files(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(line)
    with pytest.raises(ItemError, match=message):
        read_items(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="allowed: a readable file"):
        read_items(tmp_path / "none.jsonl")


def test_an_item_names_itself() -> None:
    with pytest.raises(ItemError, match="the third: answer"):
        Item("a?", ("...",), where="the third")
