"""Rows of LLaVA's JSON lines: what they become, and what is said about broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastskip.study.training import DataError, Example, JsonLines, Turn
from tests.training.conversations import picture


def said(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


GOOD: list[dict[str, Any]] = [
    {"id": "1", "image": "a.png", "conversations": said("<image>\nhi", "yes", "why?", "so")},
    {"id": "2", "conversations": said("2 + 2?", "4 — sí")},
    {"id": "3", "image": ["a.png", "b/c.png"], "conversations": said("<image>\n<image>\n?", "no")},
]
BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "an array": ('[{"id": 1}]', "a list"),
    "not UTF-8": (b"\xff\xfe", "not JSON"),
    "no conversations": ({"image": "a.png"}, "conversations: None"),
    "an odd number": ({"conversations": said("hi")}, "conversations: 1 entries"),
    "the wrong speaker": (
        {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "?"}]},
        r"conversations\[0\] is .*'gpt'",
    ),
    "an empty answer": ({"conversations": said("hi", " ")}, "answer 1 is ' '"),
    "no text": ({"conversations": [{"from": "human", "value": 3}, {}]}, r"conversations\[0\]"),
    "a missing image": (
        {"image": "x.png", "conversations": said("<image>\nhi", "yes")},
        r"no image .*x\.png",
    ),
    "an address": (
        {"image": "https://x.y/z.png", "conversations": said("hi", "yes")},
        "image 'https://x.y/z.png' is a URL",
    ),
    "a number for an image": ({"image": 7, "conversations": said("hi", "yes")}, "image is 7"),
    "too many placeholders": (
        {"image": "a.png", "conversations": said("<image><image>hi", "yes")},
        "2 <image> for 1 images",
    ),
    "a placeholder without image": (
        {"conversations": said("<image>hi", "yes")},
        "1 <image> for 0 images",
    ),
    "a placeholder in an answer": (
        {"image": "a.png", "conversations": said("hi", "<image> yes")},
        "answer 1 contains <image>",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "b").mkdir(parents=True)
    picture(1).save(tmp_path / "images" / "a.png")
    picture(2).save(tmp_path / "images" / "b" / "c.png")
    return tmp_path


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "train.jsonl"
    lines = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines))
    return path


def test_rows(folder: Path) -> None:
    data = JsonLines(write(folder, GOOD[0], "", *GOOD[1:]), folder / "images")
    assert len(data) == 3 and not data.broken
    assert [len(example.images) for example in data] == [1, 0, 2]
    assert data[0].turns == (Turn("<image>\nhi", "yes"), Turn("why?", "so"))
    assert data[1].turns[0].answer == "4 — sí"
    assert data[-1].images == (folder / "images/a.png", folder / "images/b/c.png")
    assert data[1].where.endswith("train.jsonl, line 3")
    assert [example.where for example in data[1:]] == [data[1].where, data[2].where]


@pytest.mark.parametrize("indent", (None, 2))
def test_one_array(folder: Path, indent: int | None) -> None:
    """As LLaVA's own files are: the same rows, in the same order."""
    lines = JsonLines(write(folder, *GOOD), folder / "images")
    path = folder / "train.json"
    path.write_text(json.dumps(GOOD, indent=indent))
    data = JsonLines(path, folder / "images")
    assert [(each.turns, each.images) for each in data] == [
        (each.turns, each.images) for each in lines
    ]
    assert data[-1].where.endswith("train.json, entry 3")
    path.write_text(json.dumps([GOOD[0], {"image": "a.png"}, GOOD[1]], indent=indent))
    with pytest.raises(DataError, match=r"train\.json, entry 2: conversations: None"):
        JsonLines(path, folder / "images")
    data = JsonLines(path, folder / "images", skip_broken=True)
    assert len(data.broken) == 1 and data[1].where.endswith("entry 3")
    path.write_text(json.dumps(GOOD, indent=indent)[:-9])
    with pytest.raises(DataError, match=r"train\.json: not JSON .*allowed: one array, or one"):
        JsonLines(path, folder / "images", skip_broken=True)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named(folder: Path, name: str) -> None:
    row, message = BROKEN[name]
    path = write(folder, GOOD[0], row, GOOD[1])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{message}.*allowed"):
        JsonLines(path, folder / "images")


def test_broken_rows_are_left_out_and_counted(folder: Path) -> None:
    rows = [row for row, _ in BROKEN.values()]
    data = JsonLines(write(folder, *rows, *GOOD), folder / "images", skip_broken=True)
    assert len(data) == len(GOOD) and len(data.broken) == len(BROKEN)
    assert "line 1: not JSON" in data.broken[0]
    assert data[2].where.endswith(f"line {len(BROKEN) + 3}")


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl.*allowed"):
        JsonLines(folder / "nothing.jsonl")
    with pytest.raises(DataError, match="no usable row"):
        JsonLines(write(folder, ""))
    with pytest.raises(DataError, match=r"the first one: .*line 1: not JSON"):
        JsonLines(write(folder, "{"), skip_broken=True)
    with pytest.raises(DataError, match="is not a folder"):
        JsonLines(write(folder, GOOD[1]), folder / "elsewhere")


def test_examples_are_checked() -> None:
    with pytest.raises(DataError, match="no turns"):
        Example(())
    with pytest.raises(DataError, match="question 1 is '<image>'"):
        Example((Turn("<image>", "yes"),), (picture(0),))
