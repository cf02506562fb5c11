"""Verdicts on results whose outcome is known."""

from dataclasses import replace

import pytest

from fastskip.demo.model import Size
from fastskip.intervals import Estimate
from fastskip.policy import TokenClass
from fastskip.study.paper.experiments import Cell, Scope, Section, cells
from fastskip.study.paper.findings import Finding, Verdict, findings
from fastskip.study.paper.results import Results, Row, Score, row_of
from fastskip.study.similarity import LayerSimilarity


def score(kept: float) -> Score:
    return Score(
        items=100,
        score=Estimate(kept, kept, kept),
        by_seed=(kept, kept),
        kept=kept,
        kept_by_seed=(kept, kept),
        change=Estimate(kept - 1, kept - 1, kept - 1),
    )


def row(cell: Cell, questions: float, captions: float, compute: float = 0.5) -> Row:
    size = {Size.LARGE: 400, Size.MEDIUM: 100, Size.SMALL: 10}[cell.size]
    scores = score(questions), score(captions), score(captions)
    return row_of(cell, scores, (compute, compute), size, seconds=1.0)


def everything(questions: float, captions: float) -> Results:
    """The same scores for every cell but the dense one."""
    return Results(
        environment={},
        effort={"steps": 10},
        seeds=(0, 1),
        is_whole=True,
        seconds=1.0,
        rows=tuple(
            row(cell, *((1.0, 1.0) if cell.section is Section.DENSE else (questions, captions)))
            for cell in cells()
        ),
        similarity=tuple(
            LayerSimilarity(layer, each, 10, value, value, value)
            for layer in range(8)
            for each, value in ((TokenClass.IMAGE, 0.9), (TokenClass.TEXT, 0.7))
        ),
        speeds=(),
    )


def verdict(results: Results, words: str) -> Verdict:
    return finding(results, words).verdict


def finding(results: Results, words: str) -> Finding:
    (found,) = (each for each in findings(results) if words in each.claim)
    return found


def changed(results: Results, name: str, questions: float, captions: float) -> Results:
    """With other scores in the rows whose names begin so."""
    rows = tuple(
        replace(
            each,
            questions=score(questions),
            captions=score(captions),
            whole_captions=score(captions),
        )
        if each.name.startswith(name)
        else each
        for each in results.rows
    )
    return replace(results, rows=rows)


def test_all_is_well() -> None:
    results = everything(0.99, 0.98)
    for words in ("Much", "half of the blocks", "70 %", "smaller language model", "parallel"):
        assert verdict(results, words) is Verdict.AGREES, words
    assert verdict(results, "tolerate skipping better") is Verdict.AGREES
    assert verdict(results, "change more slowly") is Verdict.AGREES
    assert "50% of a question's compute" in finding(results, "Much").evidence


def test_all_is_lost() -> None:
    results = everything(0.3, 0.4)
    for words in ("Much", "half of the blocks", "70 %", "smaller language model", "parallel"):
        assert verdict(results, words) is Verdict.DISAGREES, words
    assert verdict(results, "tolerate skipping better") is Verdict.DISAGREES
    assert verdict(results, "for image tokens") is Verdict.DISAGREES


def test_training_the_projector_is_what_the_paper_did() -> None:
    lost = everything(0.3, 0.3)
    assert verdict(changed(lost, "half-language", 0.98, 0.98), "half of") is Verdict.PARTLY
    assert verdict(changed(lost, "half-projector", 0.98, 0.98), "half of") is Verdict.AGREES
    assert verdict(changed(lost, "half-projector", 0.98, 0.95), "half of") is Verdict.DISAGREES
    assert verdict(changed(lost, "half-projector-long", 0.98, 0.98), "half of") is Verdict.AGREES
    told = finding(lost, "half of").evidence
    assert "untrained: 30.0% and 30.0%" in told and "40 steps" in told


def test_scopes_and_starts_are_compared_in_pairs() -> None:
    results = everything(0.8, 0.8)
    rows = tuple(
        replace(each, questions=score(0.9))
        if each.schedule is not None and each.schedule.scope is Scope.GENERATED
        else each
        for each in results.rows
    )
    results = replace(results, rows=rows)
    assert verdict(results, "generated tokens alone") is Verdict.AGREES
    assert "6 of 6" in finding(results, "generated tokens alone").evidence
    assert verdict(results, "starts later") is Verdict.DISAGREES  # no better is not better


def test_a_smaller_model_at_equal_compute() -> None:
    results = everything(0.8, 0.8)
    assert verdict(results, "equal compute") is Verdict.DISAGREES
    assert verdict(changed(results, "medium", 0.85, 0.8), "equal compute") is Verdict.AGREES
    assert "4.0 times smaller" in finding(results, "smaller language model").evidence


@pytest.mark.parametrize("words", ["Much", "half of", "equal compute", "for image tokens"])
def test_what_was_not_run_is_not_judged(words: str) -> None:
    results = everything(0.9, 0.9)
    dense = replace(results, rows=results.rows[:1], similarity=())
    assert verdict(dense, words) is Verdict.UNTESTED
