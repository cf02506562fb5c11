"""Metrics on known answers, and files of items."""

import json
from pathlib import Path

import pytest

from fastskip.prompts.conversations import Turn
from fastskip.study.evaluation.items import Item, ItemError, read_items
from fastskip.study.evaluation.metrics import Metric, words


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
    assert first.images == (tmp_path / "a.png",) and first.metric is Metric.EXACT
    assert (first.kind, first.references, first.where) == ("question", ("yes",), f"{path}, line 1")
    assert (second.kind, second.images, second.metric) == ("long", (), Metric.CAPTION)


def said(*speakers: str, question: str = "a?") -> str:
    """A row of LLaVA's form."""
    entries = [
        {"from": speaker, "value": question if speaker == "human" else "an answer"}
        for speaker in speakers
    ]
    return json.dumps({"conversations": entries})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "entry 1: got 1"),
        ("[{", "not JSON"),
        ("[]", "no items"),
        ("[" * 100_000, "not JSON"),
        ("7", "line 1: got 7"),
        ('{"question": "a?", "answer": "b", "extra": 1}', "unknown field 'extra'"),
        ('{"question": "a?"}', "answer is None"),
        ('{"question": "a?", "answer": [1]}', r"answer is \[1\]"),
        ('{"question": "a?", "answer": []}', r"answer is \[\]"),
        ('{"question": " ", "answer": "b"}', "question is ' '"),
        ('{"question": "a?", "answer": "b", "metric": "bleu"}', "allowed: exact, caption"),
        ('{"question": "a?", "answer": "b", "image": 1}', "image is 1"),
        ('{"question": "a?", "answer": "b", "image": ["a", 1]}', "image is .'a', 1."),
        (
            '{"question": "a?", "answer": "b", "image": ["a", "https://x.y/z.png"]}',
            "image 'https://x.y/z.png' is a URL; allowed: local files",
        ),
        ('{"question": "a?", "answer": "b", "history": 1}', "history is 1"),
        ('{"question": "a?", "answer": "b", "history": [{"question": "c"}]}', r"history\[0\] is"),
        (
            '{"question": "a?", "answer": "b", "history": [{"question": "c", "answer": " "}]}',
            r"history\[0\] is",
        ),
        ('{"question": "<image>", "answer": "b", "image": "a"}', "allowed: some words"),
        ('{"question": "<image>a?", "answer": "b"}', "1 <image> for 0 images"),
        (
            '{"question": "a?", "answer": "b", "image": ["a", "b"], "history": '
            '[{"question": "<image> c", "answer": "d"}]}',
            "1 <image> for 2 images",
        ),
        (
            '{"conversations": [{"from": "human", "value": "a?"}]}',
            "1 entries; allowed: one or",
        ),
        (said("human", "human"), r"conversations\[1\] is"),
        (said("gpt", "human"), r"conversations\[0\] is"),
        (
            '{"image": "a.jpg", ' + said("human", "gpt", question="<image><image> a?")[1:],
            "2 <image>",
        ),
        ('{"metric": "vqa", ' + said("human", "gpt")[1:], "1 string under metric vqa"),
        (said("human", "gpt", question="  "), "question 1 is"),
        ("", "no items"),
    ],
)
def test_bad_files(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(line)
    with pytest.raises(ItemError, match=message):
        read_items(path)


@pytest.mark.parametrize("most", [0, -1])
def test_at_least_one_item_is_read(tmp_path: Path, most: int) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"question": "is it red?", "answer": "yes"}))
    with pytest.raises(ItemError, match=f"most: {most}; allowed: 1 or more"):
        read_items(path, most=most)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="none.jsonl: no such file; allowed: a readable file"):
        read_items(tmp_path / "none.jsonl")


def test_an_item_names_itself() -> None:
    with pytest.raises(ItemError, match="the third: answer"):
        Item("a?", ("...",), where="the third")


ROW = {
    "id": 7,
    "model": "",
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And <image>?"},
        {"from": "gpt", "value": "A dog."},
    ],
}
EXTRA = {"question": "why?", "answer": "so", "history": [{"question": "what?", "answer": "it"}]}


@pytest.mark.parametrize("is_array", [False, True])
def test_conversations_are_items_turn_by_turn(tmp_path: Path, is_array: bool) -> None:
    rows = [ROW, EXTRA]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows, indent=1) if is_array else "\n".join(map(json.dumps, rows)))
    (tmp_path / "photos").mkdir()
    first, second, third = read_items(path, tmp_path / "photos", metric=Metric.CAPTION)
    a, b = (tmp_path / "photos" / name for name in ("a.png", "b.png"))
    # the second image comes with the second turn
    assert (first.images, first.history, first.kind) == ((a,), (), "question")
    assert (second.images, second.kind, second.references) == ((a, b), "multi-turn", ("A dog.",))
    assert second.history == (Turn("<image>\nWhat is it?", "A cat."),)
    assert second.question == "And <image>?" and second.metric is Metric.CAPTION
    name = "entry" if is_array else "line"
    assert second.where == f"{path}, {name} 1, answer 2"
    assert third.history == (Turn("what?", "it"),) and third.kind == "multi-turn"
    assert [item.question for item in read_items(path, most=1)] == [first.question]


def test_images_without_places_are_there_from_the_first_turn(tmp_path: Path) -> None:
    row = json.loads(said("human", "gpt", "human", "gpt")) | {"image": "a.png", "kind": "mine"}
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode())  # as editors of Windows begin
    items = read_items(path)
    assert [item.images for item in items] == [(tmp_path / "a.png",)] * 2
    assert [item.kind for item in items] == ["mine"] * 2


def test_broken_rows_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    # a line separator within a text is no end of a line
    good = '{"question": "a\u2028b?", "answer": "c"}'
    path.write_text("\n".join(["{", good, said("human"), good]), encoding="utf-8")
    told: list[str] = []
    items = read_items(path, on_broken=told.append)
    assert [item.question for item in items] == ["a\u2028b?"] * 2
    assert len(told) == 2 and "line 1: not JSON" in told[0] and "line 3: conv" in told[1]
    path.write_text("{")
    with pytest.raises(ItemError, match="no usable item; first problem: .*not JSON"):
        read_items(path, on_broken=told.append)
    with pytest.raises(ItemError, match="is not a folder"):
        read_items(path, tmp_path / "nowhere")
