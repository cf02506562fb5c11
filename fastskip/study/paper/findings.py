"""What the results say about the papers' claims, by the rules in this module.

Claims are taken from the papers' public abstracts only: arXiv 2410.09454 and, for image tokens,
2405.16700. No number from their tables is quoted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean

from fastskip.policy import TokenClass
from fastskip.study.paper.experiments import Learned, Part, Schedule, Scope, Section
from fastskip.study.paper.results import Results, Row

KEPT = 0.97
"""The share of the dense score that the paper retains with training."""
TAUGHT = {
    Learned.PROJECTOR: "projector trained as in the paper",
    Learned.LANGUAGE: "language model trained too",
}
MUCH = 0.2
"""The share of compute that counts as "much", where a claim gives no number."""


class Verdict(StrEnum):
    """How the miniature compares with a claim."""

    AGREES = "agrees"
    PARTLY = "agrees in part"
    DISAGREES = "does not agree"
    UNTESTED = "not measured"


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, the verdict on it, and the numbers behind the verdict."""

    claim: str
    verdict: Verdict
    evidence: str


def findings(results: Results) -> tuple[Finding, ...]:
    """All claims, in the order of the report."""
    return tuple(
        judge(results)
        for judge in (
            _much,
            _captions,
            _generated,
            _late,
            _parallel,
            _half,
            _sparse,
            _smaller,
            _equal_compute,
            _slow_images,
            _image_ffn,
        )
    )


def _much(results: Results) -> Finding:
    claim = "Much computation can be skipped at inference, without training"
    rows = results.of(Section.SKIPPING)
    good = [row for row in rows if row.questions.kept >= KEPT and row.captions.kept >= KEPT]
    if not rows:
        return _untested(claim)
    if not good:
        return Finding(claim, Verdict.DISAGREES, f"no policy retains {KEPT:.0%} of both scores")
    best = max(good, key=lambda row: row.skipped)
    verdict = Verdict.AGREES if best.skipped >= MUCH else Verdict.DISAGREES
    return Finding(
        claim,
        verdict,
        f"the most that a policy skips while retaining {KEPT:.0%} of both scores: "
        f"{best.skipped:.0%} of a question's compute ({best.label}; questions retain "
        f"{best.questions.kept:.1%}, captions {best.captions.kept:.1%})",
    )


def _captions(results: Results) -> Finding:
    claim = "Questions tolerate skipping better than captions"
    rows = [row for row in results.of(Section.SKIPPING) if _does_harm(row)]
    found = _majority(
        claim,
        [(row.questions.kept, row.whole_captions.kept) for row in rows],
        "policies that cost questions or captions at least 1 %, questions retain more than "
        "captions, both by exact match",
        "questions {0:.1%}, captions {1:.1%}",
    )
    if not rows:
        return found
    graded = fmean(row.captions.kept for row in rows)
    evidence = f"{found.evidence}; by F1, captions retain {graded:.1%}"
    return replace(found, evidence=evidence)


def _generated(results: Results) -> Finding:
    claim = "Skipping for generated tokens alone costs less than for all tokens"
    pairs = _pairs(results, lambda s: Schedule(s.part, Scope.GENERATED, s.interval, s.start))
    return _majority(
        claim,
        [(_both(other), _both(row)) for row, other in pairs],
        "schedules, skipping for generated tokens alone retains more",
        "generated {0:.1%}, all {1:.1%} (mean of questions and captions)",
    )


def _late(results: Results) -> Finding:
    """Compares three late layers with three spread ones, at equal compute."""
    claim = "Skipping that starts later costs less"
    rows = {row.schedule: row for row in results.of(Section.SKIPPING)}
    pairs = []
    for schedule, row in rows.items():
        if schedule is not None and (schedule.interval, schedule.start) == (2, 0):
            late = rows.get(replace(schedule, interval=1, start=3))
            if late is not None:
                pairs.append((_both(late), _both(row)))
    return _majority(
        claim,
        pairs,
        "pairs of equal compute, skipping layers 4, 5, 6 retains more than skipping 2, 4, 6",
        "late {0:.1%}, early {1:.1%} (mean of questions and captions)",
    )


def _parallel(results: Results) -> Finding:
    claim = "Attention and FFN, or two blocks, can run in parallel"
    rows = results.of(Section.PARALLEL)
    if not rows:
        return _untested(claim)
    good = [row for row in rows if _both(row) >= KEPT]
    best = max(rows, key=_both)
    return Finding(
        claim,
        _by_count(len(good), len(rows)),
        f"{len(good)} of {len(rows)} arrangements retain {KEPT:.0%} without training (mean of "
        f"questions and captions); the best is {best.label} with {_both(best):.1%}",
    )


def _half(results: Results) -> Finding:
    claim = "With half of the blocks skipped, training retains 97 %"
    return _trained(results, claim, "half")


def _sparse(results: Results) -> Finding:
    claim = "With 70 % of the weights removed, training retains 97 %"
    return _trained(results, claim, "sparse")


def _trained(results: Results, claim: str, name: str) -> Finding:
    before = results.row(f"{name}-nothing")
    taught = {
        learned: [
            row
            for row in results.of(Section.TRAINING)
            if row.name in (f"{name}-{learned}", f"{name}-{learned}-long")
        ]
        for learned in (Learned.PROJECTOR, Learned.LANGUAGE)
    }
    if before is None or not all(taught.values()):
        return _untested(claim)
    reached = {learned: any(_both(row) >= KEPT for row in rows) for learned, rows in taught.items()}
    verdict = Verdict.DISAGREES
    if reached[Learned.PROJECTOR]:
        verdict = Verdict.AGREES
    elif reached[Learned.LANGUAGE]:
        verdict = Verdict.PARTLY
    shares = [f"untrained: {_kept(before)}"]
    for learned, rows in taught.items():
        shares += [f"{TAUGHT[learned]}, {results.steps(row)} steps: {_kept(row)}" for row in rows]
    means = "questions and captions retain (the verdict requires 97 % of their mean): "
    return Finding(claim, verdict, means + "; ".join(shares))


def _kept(row: Row) -> str:
    return f"{row.questions.kept:.1%} and {row.captions.kept:.1%}"


def _smaller(results: Results) -> Finding:
    claim = "A well-trained smaller language model matches one that is 2 to 3 times larger"
    large, medium = results.row("dense"), results.row("medium")
    if large is None or medium is None:
        return _untested(claim)
    times = large.parameters / medium.parameters
    return Finding(
        claim,
        Verdict.AGREES if _both(medium) >= KEPT else Verdict.DISAGREES,
        f"the medium model, {times:.1f} times smaller (2 to 3 is not measured) and trained for as "
        f"many steps, retains {medium.questions.kept:.1%} of the questions' score and "
        f"{medium.captions.kept:.1%} of the captions'",
    )


def _equal_compute(results: Results) -> Finding:
    claim = "At equal compute, a smaller model does better than a larger one that skips blocks"
    medium = results.row("medium")
    skipped = [results.row(f"most-{learned}") for learned in ("nothing", "language")]
    if medium is None or None in skipped:
        return _untested(claim)
    scores = [
        f"{row.label} ({row.learned} trained; {row.question_compute:.0%} of the compute): "
        f"{row.questions.score.mean:.1%} and {row.captions.score.mean:.1%}"
        for row in skipped
        if row is not None
    ]
    best = max(_score(row) for row in skipped if row is not None)
    return Finding(
        claim,
        Verdict.AGREES if _score(medium) > best else Verdict.DISAGREES,
        f"questions and captions: medium ({medium.question_compute:.0%}): "
        f"{medium.questions.score.mean:.1%} and {medium.captions.score.mean:.1%}; "
        + "; ".join(scores),
    )


def _slow_images(results: Results) -> Finding:
    claim = "Image rows change more slowly from layer to layer than text rows (2405.16700)"
    by = {(each.token_class, each.layer): each.block for each in results.similarity}
    layers = sorted({layer for _, layer in by})
    pairs = [(by[TokenClass.IMAGE, n], by[TokenClass.TEXT, n]) for n in layers]
    return _majority(
        claim,
        pairs,
        "layers, image rows keep their direction better",
        "cosine between a block's input and output: image {0:.3f}, text {1:.3f}",
    )


def _image_ffn(results: Results) -> Finding:
    claim = "FFNs can be skipped for image tokens (2405.16700)"
    rows = [
        row
        for row in results.of(Section.SKIPPING)
        if row.schedule is not None
        and (row.schedule.part, row.schedule.scope) == (Part.FFN, Scope.IMAGE)
    ]
    if not rows:
        return _untested(claim)
    good = [row for row in rows if _both(row) >= KEPT]
    worst = min(rows, key=_both)
    return Finding(
        claim,
        _by_count(len(good), len(rows)),
        f"{len(good)} of {len(rows)} schedules retain {KEPT:.0%}; the worst retains "
        f"{_both(worst):.1%} ({worst.label}). The large model's training skipped image rows' "
        "sublayers at random, so this is no surprise",
    )


def _by_count(good: int, count: int) -> Verdict:
    """All agree, some, or none."""
    if good == count:
        return Verdict.AGREES
    return Verdict.PARTLY if good else Verdict.DISAGREES


def _majority(
    claim: str, pairs: Iterable[tuple[float, float]], of_what: str, means: str
) -> Finding:
    """Whether the first of each pair is greater: in 70 % of pairs or more, it agrees; in 30 % or
    fewer, it does not; otherwise in part."""
    pairs = list(pairs)
    if not pairs:
        return _untested(claim)
    wins = sum(a > b for a, b in pairs)
    share = wins / len(pairs)
    verdict = Verdict.PARTLY
    if share >= 0.7:
        verdict = Verdict.AGREES
    elif share <= 0.3:
        verdict = Verdict.DISAGREES
    both = means.format(fmean(a for a, _ in pairs), fmean(b for _, b in pairs))
    return Finding(claim, verdict, f"in {wins} of {len(pairs)} {of_what}; means: {both}")


def _pairs(results: Results, change: Callable[[Schedule], Schedule]) -> list[tuple[Row, Row]]:
    """Rows of scope "all", each paired with the row of its changed schedule."""
    rows = {row.schedule: row for row in results.of(Section.SKIPPING)}
    return [
        (row, rows[change(schedule)])
        for schedule, row in rows.items()
        if schedule is not None and schedule.scope is Scope.ALL and change(schedule) in rows
    ]


def _does_harm(row: Row) -> bool:
    return min(row.questions.kept, row.whole_captions.kept) <= 0.99


def _both(row: Row) -> float:
    """The share of the dense scores retained, averaged over questions and captions."""
    return fmean((row.questions.kept, row.captions.kept))


def _score(row: Row) -> float:
    return fmean((row.questions.score.mean, row.captions.score.mean))


def _untested(claim: str) -> Finding:
    return Finding(claim, Verdict.UNTESTED, "not part of this run")
