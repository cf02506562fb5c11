"""Atomic file writes: a reader sees either the old file or the new one; full disks are named."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a full disk an ``OSError`` that names ``path``, also in libraries that raise another
    (safetensors), since neither a failed write nor these say what was written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        for code in FULL:
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), str(path)) from error
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces ``path`` after the block.

    If the block raises, ``path`` is unchanged and no partial file remains. A symbolic link stays
    one. Permissions are those of a plain write to ``path``, even if a library creates the file in
    the block with others (safetensors makes it readable by the owner only). A device or pipe cannot
    be replaced and is written directly.
    """
    named, path = path, path.resolve()
    if path.exists() and not path.is_file():
        with writing(named):
            yield path
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = S_IMODE((path if path.exists() else part).stat().st_mode)
        with writing(named):
            yield part
        part.chmod(mode)
        os.replace(part, path)
    except OSError as error:
        if error.filename in (part, str(part)):
            error.filename = str(named)  # users know nothing of the part
        raise
    finally:
        part.unlink(missing_ok=True)
