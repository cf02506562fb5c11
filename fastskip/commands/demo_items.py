"""The demo's held-out items, for commands that judge its models."""

from typing import Any


def demo_items(count: int) -> list[Any]:
    """So many items: three questions to one caption."""
    from fastskip.study.paper.measuring import Effort, asked, items_of

    captions = count // 4
    return items_of(asked(0, Effort(questions=count - captions, captions=captions)))
