"""Progress bars, on stderr and only where someone watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def steps_bar(total: int | None, unit: str = "it") -> Iterator[Callable[[str], None]]:
    """A bar of named steps; yields what is called with the name of each step as it begins."""
    from tqdm import tqdm

    with tqdm(total=total, disable=None, unit=unit) as bar:

        def begin(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield begin
