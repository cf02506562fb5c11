"""Items that the dense model and a policy answer differently, with their images."""

from __future__ import annotations

import base64
from pathlib import Path

from fastskip.study.report.blocks import Cell, Example, ShownAnswer, Table, Tone
from fastskip.study.report.eval_file import EvalResult, JudgedPolicy
from fastskip.study.report.fields import Problem, ReportError
from fastskip.wording import Scale, counted

MOST_BYTES = 2 << 20
"""Maximum size of one image: these are meant to be thumbnails."""
_FORMATS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def differences(result: EvalResult, policy: JudgedPolicy) -> list[int]:
    """The items that a policy answers differently from dense, its greatest losses first."""
    pairs = list(zip(result.dense.answers, policy.answers, strict=True))
    differing = [n for n, (a, b) in enumerate(pairs) if a.text.strip() != b.text.strip()]
    return sorted(differing, key=lambda n: pairs[n][1].score - pairs[n][0].score)


def differences_table(result: EvalResult) -> Table:
    """How many answers differ, and how many of those score lower, higher or the same."""
    rows = []
    for number, policy in enumerate(result.judged[1:], start=2):
        found = differences(result, policy)
        changes = [policy.answers[n].score - result.dense.answers[n].score for n in found]
        less, more = sum(each < 0 for each in changes), sum(each > 0 for each in changes)
        counts = (len(found), less, more, len(found) - less - more)
        rows.append((Cell(str(number)), Cell(policy.label), *(Cell(str(n)) for n in counts)))
    head = ("no.", "policy", "answers that differ", "lower score", "higher score", "same score")
    caption = f"Differences from dense, out of {counted(len(result.items), 'answer')}."
    return Table(caption, head, tuple(rows))


def examples(result: EvalResult, most: int) -> list[Example]:
    """Up to `most` items: each policy's greatest losses, taken in turn.

    Raises:
        ReportError: an image cannot be used.
    """
    turns = [differences(result, policy) for policy in result.judged[1:]]
    chosen: list[int] = []
    for place in range(max(map(len, turns), default=0)):
        for own in turns:
            if place < len(own) and own[place] not in chosen and len(chosen) < most:
                chosen.append(own[place])
    return [_example(result, number) for number in chosen]


def _example(result: EvalResult, number: int) -> Example:
    item = result.items[number]
    dense = result.dense.answers[number]
    shown = [policy for policy in result.judged[1:] if number in differences(result, policy)]
    answers = [_shown(policy, number, dense.score) for policy in shown]
    return Example(
        question=item.question,
        references=" / ".join(dict.fromkeys(item.references)),
        kind=item.kind,
        images=tuple(data_uri(path) for path in item.images),
        before=item.history,
        answers=(_shown(result.dense, number, None), *answers),
    )


def _shown(policy: JudgedPolicy, number: int, dense: float | None) -> ShownAnswer:
    answer = policy.answers[number]
    tone, score = Tone.OPEN, f"score {answer.score:.2g}"
    if answer.scale is Scale.CIDER:
        score = f"{answer.scale.heading} {answer.scale.text(answer.score)}"
    if dense is not None and answer.score != dense:
        tone = Tone.GOOD if answer.score > dense else Tone.BAD
        score += ", higher than dense" if answer.score > dense else ", lower than dense"
    return ShownAnswer(policy.label, answer.text.strip() or "(empty)", score, tone)


def data_uri(path: Path) -> str:
    """An image file as a data URI.

    Raises:
        ReportError: the file cannot be read, is not a PNG, JPEG, GIF or WebP, or is too large.
    """
    allowed = f"a PNG, JPEG, GIF or WebP file of at most {MOST_BYTES} bytes"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReportError(path, "", Problem(f"cannot be read ({error})"), allowed) from error
    kind = next((name for magic, name in _FORMATS.items() if data.startswith(magic)), None)
    if kind is None or len(data) > MOST_BYTES:
        problem = Problem(f"{len(data)} bytes of {kind or 'unknown format'}")
        raise ReportError(path, "", problem, allowed)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
