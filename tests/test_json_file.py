"""JSON files that every reader takes, whole or not at all."""

import json
from pathlib import Path

import pytest

from fastskip.json_file import json_text, write_json


def test_numbers_that_are_none_are_null() -> None:
    inf, nan = float("inf"), float("nan")
    text = json_text({"a": [1.5, nan, (inf, -inf)], "b": {"c": nan, "d": True, "e": "NaN"}})
    assert text == '{"a": [1.5, null, [null, null]], "b": {"c": null, "d": true, "e": "NaN"}}'


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]
