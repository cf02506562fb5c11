"""Models side by side: small runs, and what the commands say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.demo.model import Size
from fastskip.demo.scenes import draw
from fastskip.demo.smaller import load, write_checkpoint
from fastskip.demo.text import build_processor
from fastskip.families import text_model_of
from fastskip.study.evaluation.comparison import ALL, Contender, compare
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.metrics import Metric
from fastskip.study.paper import report
from fastskip.study.paper.measuring import Effort, asked, items_of
from fastskip.wording import Scale

ITEMS = items_of(asked(0, Effort(questions=6, captions=1)))


def contender(policy: str) -> Contender:
    def loaded() -> tuple[Any, Any]:
        return fastskip.apply_(load(Size.LARGE), policy), build_processor()

    return Contender(policy, loaded)


def test_a_skipped_model_beside_the_dense_one() -> None:
    labels: list[str] = []
    pair = [contender("dense"), contender("every_nth_block")]
    dense, skipped = compare(pair, ITEMS, new_tokens=3, rounds=1, on_model=labels.append)
    assert labels == [dense.label, skipped.label] == ["dense", "every_nth_block"]
    assert not dense.changes and dense.parameters == skipped.parameters
    assert dense.parameters == sum(p.numel() for p in text_model_of(load(Size.LARGE)).parameters())
    assert 0.5 < skipped.flops / dense.flops < 0.7
    assert skipped.kv_bytes / dense.kv_bytes == pytest.approx(5 / 8)
    assert set(dense.scores) == {ALL, *(item.kind for item in ITEMS)}
    expected = Exam(ITEMS, build_processor()).take(pair[1].load()[0])
    assert skipped.scores[ALL].mean == expected.mean()
    change = skipped.scores[ALL].mean - dense.scores[ALL].mean
    assert skipped.changes[ALL].mean == pytest.approx(change)
    assert dense.ttft_s > dense.tpot_s > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"new_tokens": 1}, "new_tokens: 1"), ({"rounds": 0}, "rounds: 0")],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare([contender("dense")], ITEMS, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contenders: 0"):
        compare([], ITEMS)


def test_captions_that_only_all_items_together_score() -> None:
    items = [replace(item, metric=Metric.CIDER) for item in ITEMS[:3]]
    (dense,) = compare([contender("dense")], items, new_tokens=3, rounds=1)
    assert dense.scale is Scale.CIDER and dense.scores[ALL].mean > 0


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["study", *arguments])


def test_compare_command_on_items_of_a_file(tmp_path: Path) -> None:
    scene, question = asked(0, Effort(questions=1, captions=0))[0]
    draw(scene).save(tmp_path / "a.png")
    line = {"question": question.text, "answer": question.answer, "image": "a.png"}
    (tmp_path / "items.jsonl").write_text(json.dumps(line))
    items = ("--items", str(tmp_path / "items.jsonl"), "--new-tokens", "2")
    done = run("compare", "demo:large", "demo:large@every_nth_block", *items, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each["label"] for each in found] == ["demo:large", "demo:large@every_nth_block"]
    assert found[0]["flops"] > found[1]["flops"]
    shown = run("compare", "demo:large", *items)
    assert shown.exit_code == 0 and "demo:large" in shown.stdout and "1 item, 95" in shown.stdout
    (tmp_path / "small[b]").mkdir()
    write_checkpoint(Size.SMALL, tmp_path / "small[b]")
    shown = run("compare", str(tmp_path / "small[b]"), *items)
    assert shown.exit_code == 0 and "small[b]" in "".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "demo:huge"), "demo:large, demo:medium, demo:small"),
        (("compare", "no/such/folder"), "no such folder"),
        (("compare", "demo:large@nothing"), "policy"),
        (("compare", "some/model"), "--items: needed"),
        (("paper", "--quick"), "nothing runs; allowed: with --out DIR"),
        (("paper", "--seeds", "3"), "nothing runs; allowed: with --out DIR"),
        (("paper", "--device", "cpu"), "nothing runs; allowed: with --out DIR"),
        (("paper", "--show", "--out", "no-such-folder"), "results.json"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_scales_are_not_mixed(tmp_path: Path) -> None:
    rows = [{"question": "a?", "answer": "b", "metric": metric} for metric in ("exact", "cider")]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("compare", "demo:small", "--items", str(tmp_path / "items.jsonl"))
    assert done.exit_code == 2 and "metric: exact and cider; allowed: cider for all" in done.output


def test_help_teaches() -> None:
    for command, words in (
        ((), ("paper", "compare")),
        (("paper",), ("--quick", "--show", "resumes", "Examples")),
        (("compare",), ("demo:medium", "--items", "conversations", "one model", "Examples")),
    ):
        done = run(*command, "--help")
        text = " ".join(done.output.lower().split())
        assert done.exit_code == 0 and all(word.lower() in text for word in words), command


def test_bundled_results_are_shown() -> None:
    done = run("paper")
    assert done.exit_code == 0, done.output
    assert "report.md" in done.output and "agree" in done.output


def test_bundled_results_are_small_and_whole() -> None:
    from fastskip.study.paper.experiments import cells
    from fastskip.study.paper.results import Results

    folder = report.bundled_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 500_000
    results = Results.load(folder / report.RESULTS)
    assert [row.name for row in results.rows] == [cell.name for cell in cells()]
    assert results.is_whole and len(results.seeds) == 3
    drawn = [path.stem for path in folder.glob("*.png")]
    assert (folder / report.REPORT).read_text() == report.markdown(results, drawn)
