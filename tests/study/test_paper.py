"""The paper's experiments, tiny: what is run, that a run goes on, that all files say the same."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.demo.model import Size
from fastskip.demo.smaller import load
from fastskip.families import text_model_of
from fastskip.policy import TokenClass
from fastskip.study.evaluation.exam import Exam
from fastskip.study.paper import report, runner
from fastskip.study.paper.experiments import (
    DENSE,
    HALF,
    Learned,
    Part,
    Schedule,
    Scope,
    Section,
    cells,
)
from fastskip.study.paper.measuring import Effort
from fastskip.study.paper.results import Results, ResultsError
from fastskip.study.paper.runner import Study
from fastskip.study.paper.tuning import conversations, tune_

TINY = Effort(questions=6, captions=2, steps=1, sequences=2, similarity_samples=2, timing_rounds=1)
SKIPPED = next(cell for cell in cells() if cell.schedule == HALF)
PAIRS = next(cell for cell in cells() if cell.section is Section.PARALLEL)
TRAINED = next(cell for cell in cells() if cell.name == "sparse-projector")
CHOSEN = (DENSE, SKIPPED, PAIRS, TRAINED)


@pytest.fixture(scope="module", autouse=True)
def few_timed() -> Any:
    """Times of two models are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastskip.study.paper.runner.contenders", lambda: (DENSE, SKIPPED))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    steps: list[str] = []
    study = Study(folder, seeds=2, effort=TINY, chosen=CHOSEN)
    found = study.run(steps.append)
    assert len(steps) == study.steps == 2 * len(CHOSEN) + 2
    report.write(found, folder)
    return found


def test_every_cell_is_measured(results: Results) -> None:
    assert [row.name for row in results.rows] == [cell.name for cell in CHOSEN]
    assert results.is_whole and results.seeds == (0, 1)
    dense, half, pairs, sparse = results.rows
    assert all(row.seconds > 0 for row in results.rows)
    assert results.seconds == pytest.approx(sum(row.seconds for row in results.rows))
    assert dense.questions.kept == 1 and dense.question_compute == 1
    assert dense.questions.items == 12 and dense.captions.items == 4
    assert dense.questions.change.mean == 0
    # 3 of 8 blocks, but for the lm_head; the last layer's rule makes each of the others count more
    assert 0.5 < half.question_compute < 0.65 and pairs.question_compute == 1
    assert sparse.removed == 0.7 and sparse.question_compute == 1
    decoder = text_model_of(load(Size.LARGE))
    size = sum(p.numel() for p in decoder.parameters()) + 64 * Size.LARGE.value.width
    assert {row.parameters for row in results.rows} == {size}
    assert {each.token_class for each in results.similarity} == set(TokenClass)
    assert [each.name for each in results.speeds] == [DENSE.name, SKIPPED.name]
    assert all(each.ttft_s > each.tpot_s > 0 for each in results.speeds)


def test_all_files_say_what_the_json_says(results: Results, folder: Path) -> None:
    read = Results.load(folder / report.RESULTS)
    assert [row.name for row in read.rows] == [row.name for row in results.rows]
    assert read.rows[1].schedule == SKIPPED.schedule
    with (folder / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    text = (folder / report.REPORT).read_text()
    for line, row in zip(lines, read.rows, strict=True):
        assert (line["name"], line["section"]) == (row.name, row.section.value)
        assert float(line["questions_score"]) == pytest.approx(row.questions.score.mean, abs=1e-5)
        assert float(line["captions_kept"]) == pytest.approx(row.captions.kept, abs=1e-5)
        whole = float(line["whole_captions_score"])
        assert whole == pytest.approx(row.whole_captions.score.mean, abs=1e-5)
        assert whole <= float(line["captions_score"])
        assert float(line["question_compute"]) == pytest.approx(row.question_compute, abs=1e-5)
        told = next(part for part in text.splitlines() if part.startswith(f"| {row.label} |"))
        assert f"{row.questions.score.mean:.1%} (" in told
        assert f"{row.captions.kept:.1%}" in told
        assert f"{row.question_compute:.0%} / {row.caption_compute:.0%}" in told
    with (folder / "similarity.csv").open() as file:
        blocks = [float(line["block"]) for line in csv.DictReader(file)]
    assert blocks == pytest.approx([each.block for each in read.similarity], abs=1e-5)
    for name in ("skipping", "parallel", "training", "smaller", "similarity"):
        assert f"![{name}]({name}.png)" in text and (folder / f"{name}.png").stat().st_size > 1000
    assert "small synthetic task" in text


def test_a_run_cut_off_goes_on(
    results: Results, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cells that were done are not measured again, and the end is the same."""
    taken: list[int] = []
    plain: Callable[..., Any] = Exam.take

    class CutOff(Exception):
        pass

    def take(exam: Exam, model: Any) -> Any:
        if len(taken) == 3:
            taken.append(0)
            raise CutOff
        taken.append(1)
        return plain(exam, model)

    monkeypatch.setattr(Exam, "take", take)
    chosen = CHOSEN[:3]
    with pytest.raises(CutOff):
        Study(tmp_path, seeds=2, effort=TINY, chosen=chosen).run()
    found = Study(tmp_path, seeds=2, effort=TINY, chosen=chosen).run()
    assert sum(taken) == 6  # each cell once for each seed
    for ours, theirs in zip(found.rows, results.rows, strict=False):
        assert (ours.questions, ours.captions) == (theirs.questions, theirs.captions)


def test_files_of_other_settings_are_measured_anew(results: Results, folder: Path) -> None:
    study = Study(folder, seeds=2, effort=TINY, chosen=CHOSEN)
    assert study.has(DENSE, 0) and study.has(TRAINED, 1) and not study.has(DENSE, 2)
    more = Study(folder, seeds=2, effort=replace(TINY, questions=7), chosen=CHOSEN)
    assert not more.has(DENSE, 0)
    longer = Study(folder, seeds=2, effort=replace(TINY, steps=2), chosen=CHOSEN)
    assert longer.has(DENSE, 0) and not longer.has(TRAINED, 0)
    path = next((folder / "cells").glob("*.json"))
    whole = path.read_text()
    for broken in (whole[: len(whole) // 2], "[]", "null", "[" * 100_000, "\udcff"):
        path.write_text(broken, encoding="utf-8", errors="surrogateescape")
        missing = [(c.name, seed) for c in CHOSEN for seed in (0, 1) if not study.has(c, seed)]
        assert len(missing) == 1
    path.write_text(whole)


def test_times_of_another_machine_are_measured_anew(
    results: Results, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Study(shutil.copytree(folder, tmp_path / "moved"), seeds=2, effort=TINY, chosen=CHOSEN)
    assert copy.speeds() == results.speeds
    monkeypatch.setattr(runner, "environment", lambda dtype: {"processor": "another"})
    moved = copy.results()
    assert moved.environment["processor"] == "another" and moved.speeds != results.speeds
    assert moved.rows == results.rows


def test_removed_weights_stay_removed_while_training() -> None:
    study = Study(Path("unused"), seeds=1, effort=TINY, chosen=CHOSEN)
    cell = replace(TRAINED, learned=Learned.LANGUAGE)
    model, masks = study._prepared(cell)
    before = [layer.mlp.up_proj.weight.clone() for layer in text_model_of(model).layers]
    # the first step's rate is 0: it is the first of the warm-up
    two = replace(TINY, steps=2)
    assert len(tune_(model, cell, 0, two, study.processor, masks)) == 2
    for layer, old in zip(text_model_of(model).layers, before, strict=True):
        new = layer.mlp.up_proj.weight
        assert (new == 0).float().mean().item() == pytest.approx(0.7, abs=0.01)
        assert ((new == 0) == (old == 0)).all() and not (new == old).all()


def test_schedules_are_those_of_the_papers_code() -> None:
    def layers(interval: int, start: int) -> tuple[int, ...]:
        return Schedule(Part.BLOCK, Scope.ALL, interval, start).layers(32)

    assert [len(layers(i, s)) for i, s in ((2, 0), (2, 4), (3, 0), (4, 0))] == [15, 13, 10, 7]
    assert layers(2, 4)[:2] == (6, 8)  # both ends are exclusive
    assert HALF.layers() == (2, 4, 6)


def test_cells_have_names_of_their_own_and_policies_that_fit() -> None:
    for is_quick in (False, True):
        found = cells(is_quick)
        assert found[0] is DENSE and len({cell.name for cell in found}) == len(found)
        scopes = {cell.schedule.scope for cell in found if cell.schedule is not None}
        assert scopes == set(Scope)
    model = fastskip.apply_(load(Size.LARGE), "dense")
    for cell in cells():
        if cell.size is Size.LARGE:
            fastskip.set_policy(model, cell.policy)
    for cell in cells():
        if cell.schedule is not None:
            fastskip.set_policy(model, cell.policy)
            skipped = {
                (layer.index, each, part)
                for layer in fastskip.plan_of(model).layers
                for each, one in layer.cells.items()
                for part, runs in (("attention", one.attention), ("ffn", one.ffn))
                if not runs
            }
            assert skipped == {
                (layer, each, part)
                for layer in cell.schedule.layers()
                for each in cell.schedule.scope.classes
                for part in ("attention", "ffn")
                if cell.schedule.part in (part, "block")
            }


def test_training_data_are_of_the_train_split_and_the_seed() -> None:
    first, again, other = conversations(3, 0), conversations(3, 0), conversations(3, 1)
    assert [e.turns for e in first] == [e.turns for e in again] != [e.turns for e in other]
    assert all(len(example.turns) == 8 and len(example.images) == 1 for example in first)


def test_bad_results_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ResultsError, match=r"results\.json.*allowed"):
        Results.load(path)
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ResultsError, match="schema_version 99"):
        Results.load(path)
    with pytest.raises(ValueError, match="seeds: 0"):
        Study(tmp_path, seeds=0)


def test_a_cell_without_all_seeds_is_told(folder: Path, results: Results) -> None:
    more = replace(SKIPPED, name="other", learned=Learned.LANGUAGE)
    partly = Study(folder, seeds=2, effort=TINY, chosen=(*CHOSEN, more)).results()
    assert not partly.is_whole and partly.row("other") is None
    assert "still missing" in report.markdown(partly)


def test_the_command_runs_resumes_and_shows(
    folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of the other tests, so that all cells are there already."""
    monkeypatch.setattr("fastskip.study.paper.experiments.cells", lambda is_quick: CHOSEN)
    monkeypatch.setattr("fastskip.study.paper.measuring.QUICK", TINY)
    (folder / report.REPORT).unlink()
    options = ["study", "paper", "--out", str(folder), "--seeds", "2"]
    done = CliRunner().invoke(app, [*options, "--quick"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert (folder / report.REPORT).exists() and "4 cells, 2 seeds" in done.output
    shown = CliRunner().invoke(app, [*options, "--show"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0 and "4 cells, 2 seeds" in shown.output
