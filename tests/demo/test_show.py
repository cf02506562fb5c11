"""`fastskip demo`: a small run of all of it, and what its parts must get right."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from fastskip import timing
from fastskip.demo import checkpoint_path, show, terminal
from fastskip.demo.measure import Bench, Effort, _judge
from fastskip.demo.policies import DENSE, HF, Candidate, candidates
from fastskip.demo.results import Example, Report, Score
from fastskip.demo.scenes import Figure, Question, QuestionKind, Scene, Split, scenes
from fastskip.families import shape_of
from fastskip.plan import make_plan
from fastskip.plan.costs import Ceilings
from fastskip.plotting import PlotsError
from fastskip.timing import Times, best, endless, promising, race, time_once

CEILINGS = Ceilings(2e10, 1e11)
TINY = Effort(
    examples=2,
    rounds=1,
    new_tokens=3,
    chunks=1,
    questions=2,
    captions=1,
    speed_s=0,
    total_s=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "QUICK", TINY)
        patch.setattr("fastskip.machine.measure_ceilings", lambda dtype: CEILINGS)
        patch.setattr(torch, "get_num_threads", lambda: 1)
        return show.run(plots=folder / "plots", quick=True, json=folder / "numbers.json")


def test_all_candidates_are_measured(report: Report) -> None:
    assert [row.candidate for row in report.rows] == list(candidates(8, quick=True))
    for row in report.rows:
        assert row.quality.questions.asked == 2 and row.quality.captions.asked == 1
        for speed in (row.prefill, row.decode):
            assert len(speed.timing.samples) == 1 and speed.timing.seconds > 0
            assert speed.floor_s > 0
            assert (speed.ideal is None) == (row.candidate is HF)
            assert speed.share_of_ideal is None or speed.ideal
    assert report.agreement == Score(3, 3)
    assert (report.workload.n_image, report.workload.n_new) == (64, 3)


def test_baselines_are_the_yardsticks(report: Report) -> None:
    hf, dense, *others = report.rows
    assert (hf.candidate, dense.candidate) == (HF, DENSE)
    for phase in ("prefill", "decode"):
        seconds = [getattr(row, phase).timing.seconds for row in report.rows]
        assert getattr(hf, phase).vs_hf == getattr(dense, phase).vs_dense == 1
        for row, own in zip(report.rows, seconds, strict=True):
            assert getattr(row, phase).vs_hf == pytest.approx(seconds[0] / own)
            assert getattr(row, phase).vs_dense == pytest.approx(seconds[1] / own)
    assert dense.prefill.ideal == dense.decode.ideal == 1
    ideals = {row.candidate.label: (row.prefill.ideal, row.decode.ideal) for row in others}
    assert all(ideal and ideal > 1.3 for ideal in ideals["2nd blocks, all tokens"])
    assert ideals["2nd blocks, generated"][0] == 1


def test_numbers_are_written(report: Report, folder: Path) -> None:
    found = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(report.to_dict()))
    assert {"processor", "threads", "torch", "transformers"} <= set(found["environment"])
    assert set(found["rows"][2]) == {
        "label",
        "policy",
        "questions",
        "captions",
        "prefill",
        "decode",
    }
    assert found["rows"][0]["policy"] is None
    assert found["rows"][2]["policy"]["name"] == "image_ffn"
    assert found["rows"][2]["prefill"]["median_ms"] > 0
    assert found["model"]["layers"] == 8


def test_plots_are_written(report: Report, folder: Path) -> None:
    written = sorted(path.name for path in (folder / "plots").iterdir())
    assert written == ["accuracy_speed.png", "pictures.png", "policies.png"]
    assert all((folder / "plots" / name).stat().st_size > 10_000 for name in written)


def test_missing_matplotlib_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsError, match=r"pip install 'fastskip\[plots\]'"):
        show.run(plots=tmp_path / "plots")


def _printed(thing: Any, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(thing)
    return capture.get().splitlines()


def test_tables_fit_a_narrow_terminal(report: Report) -> None:
    for table in (terminal.summary(report), terminal.closeness(report)):
        lines = _printed(table)
        assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
        for row in report.rows:
            assert sum(line.strip().startswith(row.candidate.label) for line in lines)
    assert "Dense gives Hugging Face's answer to 3 of 3" in " ".join(
        _printed(terminal.notes(report))
    )


def test_pictures_in_the_terminal(report: Report) -> None:
    scene = Scene((Figure("red", "circle", 0, 1), Figure("blue", "cross", 3, 3)), 0, 0)
    question = Question(QuestionKind.COUNT, "how many objects are there?", "two")
    shown = _printed(
        terminal.gallery([Example(scene, question, {"a": "two", "b": "ten"})], 80, False)
    )
    assert "red ●" in shown[0] and "blu ✚" in shown[3]
    assert [line.strip() for line in shown[-2:]] == ["✓ a", "✗ b: ten"]
    picture = terminal.picture(scenes(Split.TEST, 1, 0)[0])
    assert picture.plain.split("\n") == 12 * ["▀" * 24] + [""]


@pytest.mark.parametrize("depth", [8, 9, 24, 32])
def test_candidates_fit_any_depth(depth: int) -> None:
    config = AutoConfig.from_pretrained(checkpoint_path())
    config.text_config.num_hidden_layers = depth
    for candidate in candidates(depth):
        if candidate.policy is not None:
            plan = make_plan(candidate.policy, shape_of(config))
            assert plan.is_dense == (candidate is DENSE)


def test_interval() -> None:
    low, high = Score(95, 100).interval
    assert [low, high] == pytest.approx([0.888, 0.978], abs=1e-3)
    assert Score(0, 10).interval[0] == 0 and Score(10, 10).interval[1] == 1


def test_judging() -> None:
    scene = scenes(Split.TEST, 1, 0)[0]
    items = [
        (scene, Question(QuestionKind.COUNT, "", "two")),
        (scene, Question(QuestionKind.COLOUR, "", "red")),
        (scene, Question(QuestionKind.CAPTION, "", "a red circle")),
    ]
    quality = _judge(items, ["two", "blue", "a red circle"])
    assert (quality.questions, quality.captions) == (Score(1, 2), Score(1, 1))


def test_everyone_runs_in_turn() -> None:
    order: list[tuple[str, int]] = []

    def run(name: str) -> Times:
        order.append((name, torch.get_num_threads()))
        return Times(1.0 * len(order), 2.0, 3.0)

    before = torch.get_num_threads()
    runs = race(
        ["a", "b"], run, threads=(1,), rounds=4, budget_s=60, on_round=lambda: order.append(("", 0))
    )
    assert torch.get_num_threads() == before
    assert [name for name, _ in order] == [*"ab", "", *"ba", "", *"ab", "", *"ba", ""]
    assert best(runs, "a", "prefill").samples == tuple(times.prefill for times in runs["a", 1])


def test_rounds_end_with_the_time() -> None:
    runs = race(
        ["a"], lambda _: Times(1, 1, 1), threads=(1,), rounds=99, budget_s=0, on_round=lambda: None
    )
    assert len(runs["a", 1]) == timing.LEAST_ROUNDS


def test_the_better_number_of_threads_counts() -> None:
    runs: dict[tuple[str, int], Sequence[Times]] = {
        ("a", 1): [Times(3, 1, 0)],
        ("a", 2): [Times(2, 2, 0)],
    }
    assert best(runs, "a", "prefill").threads == 2
    assert best(runs, "a", "decode").threads == 1


def test_hopeless_numbers_of_threads_are_left_out() -> None:
    def probed(*runs: Times) -> list[int]:
        left = iter(runs)
        return promising([1, 2], lambda: next(left))

    assert probed(Times(2, 1, 0), Times(1, 2, 0)) == [1, 2]
    assert probed(Times(1, 1, 0), Times(1.4, 9, 0)) == [1, 2]
    assert probed(Times(1, 1, 0), Times(4, 9, 0), Times(4, 9, 0)) == [1]
    assert probed(Times(4, 9, 0), Times(1, 1, 0), Times(1.4, 9, 0)) == [1, 2]


def test_times_of_one_call() -> None:
    bench = Bench.load(checkpoint_path())
    ids = torch.tensor([[1, *[bench.hf.config.image_token_id] * 64, 5, 6]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, 64, 64),
    }
    end = bench.ours.generation_config.eos_token_id
    with endless(bench.hf), endless(bench.ours):
        for candidate in (HF, DENSE, Candidate("x", candidates(8)[2].policy)):
            times = time_once(bench.model(candidate), inputs, 4)
            assert 0 < times.prefill < times.ttft and times.decode > 0
    assert bench.ours.generation_config.eos_token_id == end
    assert not bench.ours.get_decoder()._forward_pre_hooks
