"""The demo's held-out items, for commands that evaluate its models."""

from typing import Any

MULTI_TURN, DETAIL = "multi-turn", "detail"
"""Kinds in addition to those of the questions."""


def demo_items(count: int) -> list[Any]:
    """`count` items: three questions to one caption."""
    from fastskip.study.paper.measuring import Effort, asked, items_of

    captions = count // 4
    return items_of(asked(0, Effort(questions=count - captions, captions=captions)))


def demo_tasks(count: int, seed: int = 0) -> list[Any]:
    """`count` items: a quarter captions, a quarter second turns, a quarter about details."""
    from dataclasses import replace

    from fastskip.demo.evaluation import held_out_conversations, held_out_details
    from fastskip.prompts.conversations import Turn
    from fastskip.study.paper.measuring import FIRST_SEED, Effort, asked, items_of

    part = count // 4
    plain = items_of(asked(seed, Effort(questions=count - 3 * part, captions=part)))
    details = items_of(held_out_details(part, FIRST_SEED + seed))
    talks = held_out_conversations(part, FIRST_SEED + seed)
    late = items_of([(scene, second) for scene, (_, second) in talks])
    return [
        *plain,
        *(
            replace(item, kind=MULTI_TURN, history=(Turn(first.text, first.answer),))
            for item, (_, (first, _)) in zip(late, talks, strict=True)
        ),
        *(replace(item, kind=DETAIL) for item in details),
    ]
