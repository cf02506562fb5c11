"""Files that are written in one go: a reader sees the old one or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``path`` behind the block; a link stays one.

    Whatever the block raises, what ``path`` was before is still there, and no half beside it. Who
    may read it is as if ``path`` had been opened and written, whoever else makes the file within
    the block (safetensors lets nobody but its owner read one). A device or a pipe is no file that
    could be replaced, and is written as it is.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = S_IMODE((path if path.exists() else part).stat().st_mode)
        yield part
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
