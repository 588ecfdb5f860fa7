"""Files that a reader sees whole or not at all: the one way to write them, and to know that they are on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAFT = ".tmp"


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A draft that takes the place of a file (or of a folder that is not there) when the body ends.

    Where the body fails, the draft is removed, since a full disk needs the room, and the old file stays. Where the body
    leaves no draft, nothing changes. What a process that was killed leaves behind ends in :data:`DRAFT`.

    Args:
        path: The file, in a folder that exists.
        durable: Whether the contents and the name are on the disk at the end; else after a crash of the machine the
            file may be the old one or empty.

    Yields:
        The name of the draft, beside the file and different in each process.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}{DRAFT}")
    _remove(draft)  # of a process of that number before
    try:
        yield draft
        if not draft.exists():
            return
        if durable:
            sync(draft)
        os.replace(draft, path)
    except BaseException as error:
        _remove(draft)
        if isinstance(error, OSError) and error.errno:  # the system names no file where one cannot grow
            error.filename = error.filename or str(path)
        raise
    if durable:
        sync(path.parent)


def write_whole(path: Path, data: bytes | str) -> None:
    """Replace a file's contents in one go; text is written as UTF-8."""
    with replacing(path) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network mounts know no such request for a folder; its names are then the server's concern.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
