"""Where commands write: tried before the work, so that no result is lost at the end."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from fastskip.commands.common import CommandError


def check_folder(option: str, folder: Path | None) -> None:
    """Creates the folder, writes in it, and removes what it created; does nothing for ``None``.

    Raises:
        CommandError: the folder cannot be created or written.
    """
    if folder is not None:
        _try(option, folder, folder, "a folder that can be created and written")


def check_file(
    option: str, file: Path | None, suffixes: Collection[str] = (), *, creates: bool = True
) -> None:
    """The same for a file's folder, which must exist unless the command `creates` it.

    Raises:
        CommandError: the folder cannot be created or written, the path is a folder, or its suffix
            is none of `suffixes`, if there are any.
    """
    if file is None:
        return
    kinds = f" ({', '.join(suffixes)})" if suffixes else ""
    where = "a folder that can be created and written" if creates else "an existing folder"
    allowed = f"a file{kinds} in {where}"
    if file.is_dir():
        raise CommandError(f"{option} {file}: is a folder; allowed: {allowed}")
    if suffixes and file.suffix.lower() not in suffixes or not (creates or file.parent.is_dir()):
        raise CommandError(f"{option} {file}: allowed: {allowed}")
    _try(option, file, file.parent, allowed)


def _try(option: str, named: Path, folder: Path, allowed: str) -> None:
    made: list[Path] = []
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.is_dir():
                each.mkdir()
                made.append(each)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CommandError(f"{option} {named}: {error}; allowed: {allowed}") from error
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()
