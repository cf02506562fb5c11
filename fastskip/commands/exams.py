"""What `eval` and `search` share: which items, asked how, and what becomes of broken ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastskip.commands.common import CommandError, config_of

if TYPE_CHECKING:
    from fastskip.study.evaluation import Exam
    from fastskip.study.items import Item, ItemError

ItemsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='JSON lines: {"question": "...", "answer": "..." or ["...", ...], "image": '
        '"a.jpg" or ["a.jpg", ...]}, and "kind", "metric" and "history" where wanted; or '
        "LLaVA's conversations (lines or one array), of which each answer is an item, with the "
        "turns before it as given. Default, for the demo's model alone: its own.",
        show_default=False,
    ),
]
ImageFolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where image paths start. Default: the folder of the items.",
        show_default=False,
    ),
]
PromptsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at once.")]
AnswerTokensOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.")
]


def check_sources(model: str | None, items: Path | None, images: Path | None) -> None:
    """Only the demo's model has items of its own."""
    if items is None and (model is not None or images is not None):
        option = "--images" if model is None else "--model"
        raise CommandError(f"--items: needed with {option}; a file of JSON lines, see --help")


def exam_of(
    items: "Sequence[Item]", path: str, batch: int, answer_tokens: int, smaller: int = 1
) -> "Exam":
    """The items as inputs of a checkpoint; ``smaller``: what sides of images are divided by."""
    from fastskip.prompts import processor_for
    from fastskip.study.evaluation import Exam
    from fastskip.study.smaller_images import shrunk_processor

    processor: Any = processor_for(path)
    return Exam(
        list(items),
        processor if smaller == 1 else shrunk_processor(processor, smaller),
        config=config_of(path),
        batch_size=batch,
        new_tokens=answer_tokens,
    )


def first_of(broken: Sequence[str], advice: str = "") -> "ItemError":
    """The error about items that cannot be asked."""
    from fastskip.study.items import ItemError

    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return ItemError(f"{broken[0]}{more}{advice}")
