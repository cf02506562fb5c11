"""What `eval` and `search` share: items, how to ask them, and errors about broken ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import CommandError, config_of

if TYPE_CHECKING:
    from fastskip.study.evaluation.exam import Exam
    from fastskip.study.evaluation.items import Item, ItemError

ItemsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='JSON lines: {"question": "...", "answer": "..." or ["...", ...], "image": '
        '"a.jpg" or ["a.jpg", ...]}, optionally with "kind", "metric" and "history"; or '
        "LLaVA conversations (JSON lines or one array), where each answer becomes an item with the "
        "turns before it as history. Default, for the demo's model only: its own items.",
        show_default=False,
    ),
]
PromptsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts per batch.")]
AnswerTokensOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Maximum tokens per answer.")
]
TimedTokensOption = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens to generate in a timed run.")
]
CountOption = Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of items.")]


def check_sources(model: str | None, items: Path | None, images: Path | None) -> None:
    """Requires items, unless the demo's model answers its own."""
    if items is None and (model is not None or images is not None):
        option = "--images" if model is None else "--model"
        raise CommandError(f"--items: needed with {option}; allowed: a JSON lines file, see --help")


def exam_of(
    items: "Sequence[Item]", path: str, batch: int, answer_tokens: int, smaller: int = 1
) -> "Exam":
    """The items as inputs of a checkpoint; ``smaller`` divides the sides of images."""
    from fastskip.prompts import processor_for
    from fastskip.study.evaluation.exam import Exam
    from fastskip.study.evaluation.smaller_images import shrunk_processor

    processor: Any = processor_for(path)
    return Exam(
        list(items),
        processor if smaller == 1 else shrunk_processor(processor, smaller),
        config=config_of(path),
        batch_size=batch,
        new_tokens=answer_tokens,
    )


def first_of(broken: Sequence[str], advice: str = "") -> "ItemError":
    """The error that names the first of the items that cannot be asked."""
    from fastskip.study.evaluation.items import ItemError

    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return ItemError(f"{broken[0]}{more}{advice}")
