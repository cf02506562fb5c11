"""Tables of names and numbers: a line per row if the terminal is wide enough, else per cell."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def new_table(titles: Sequence[str], texts: int = 1) -> Table:
    """An empty table: so many columns of text, then right-aligned numbers; long words fold."""
    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(table.columns):
        column.overflow, column.justify = "fold", "left" if index < texts else "right"
    return table


def number_table(titles: Sequence[str], least: int) -> Table:
    """The same for `show_table`: names may fold to `least` characters, numbers do not."""
    table = new_table(titles)
    table.columns[0].min_width = least
    for column in table.columns[1:]:
        column.no_wrap = True
    return table


def show_table(console: Console, table: Table) -> None:
    """Print a table; if it is too wide for the console, a line per cell instead."""
    first, *rest = table.columns
    # two spaces between columns, one at the edge
    needed = (first.min_width or 0) + sum(2 + _width(column) for column in rest) + 1
    if needed <= console.width:
        console.print(table)
        return
    titles = [_line(str(column.header)) for column in rest]
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print()
        if name:
            console.print(f"[bold]{name}[/]")
        for title, cell in zip(titles, cells, strict=True):
            if text := _line(str(cell)):
                console.print(f"  {title}: {text}")
    console.print()


def _width(column: Column) -> int:
    texts = (Text.from_markup(str(each)) for each in (column.header, *column.cells))
    return max(line.cell_len for text in texts for line in text.split("\n"))


def _line(text: str) -> str:
    """The lines of a cell joined into one."""
    return ", ".join(filter(None, text.replace("\n/", "/").split("\n")))
