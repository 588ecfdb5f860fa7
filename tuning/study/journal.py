"""The journal of a study: one record a line, and what to do with a line that is none.

A machine that died, or a full disk, may leave half a record. It is taken out; any other spoiled line is named.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from optuna.storages.journal import JournalFileSymlinkLock

from ugrl.errors import ConfigError
from ugrl.foreign import read_bytes
from ugrl.text import brief

BEGIN = b'{"op_code":'  # of every record


def ends_whole(path: Path) -> bool:
    """Whether the last line of a journal is a record; only the file's end is read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = 1 << 12
        while True:
            start = max(0, size - length)
            file.seek(start)
            *lines, last = file.read(size - start).split(b"\n")
            if len(lines) > 1 or not start:
                return not last and (not lines or _record(lines[-1]))
            length *= 4


def spoiled(path: Path, number: int, why: str) -> str:
    """One line for a spoiled record."""
    return f"{path}: line {number}: no record of a study ({why}); restore the file from a copy, or begin a new search"


def mend_journal(path: Path) -> bool:
    """Take out what a machine that died, or a full disk, left half written.

    Optuna would read no further than such a line, and what others append after it would be lost. Half a line is no
    record: whoever wrote it was not told that it is safe. It is the last one, or the next record follows it on the same
    line.

    Returns:
        Whether anything was taken out.

    Raises:
        ConfigError: Another line is spoiled: without it, the numbers of what follows would mean something else.
    """
    if not path.exists() or _whole(read_bytes(path, "study's journal", error=ConfigError)):
        return False
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # nobody is writing now
    try:
        data = path.read_bytes()
        if torn := not _whole(data):
            *lines, last = data.split(b"\n")
            kept = [_mended(path, k, text) for k, text in enumerate(lines, 1)]
            kept += [last] if _record(last) else []
            temporary = path.with_name(path.name + ".mended")
            temporary.write_bytes(b"".join(text + b"\n" for text in kept))
            os.replace(temporary, path)
    finally:
        lock.release()
    return torn


def _whole(data: bytes) -> bool:
    *lines, last = data.split(b"\n")
    return not last and all(map(_record, lines))


def _mended(path: Path, number: int, text: bytes) -> bytes:
    """A line, or the record after half a one."""
    if _record(text):
        return text
    tail = text[text.rfind(BEGIN) :]
    if text.rfind(BEGIN) > 0 and text.startswith(BEGIN[:1]) and _record(tail):
        return tail
    raise ConfigError(spoiled(path, number, f"found {brief(text, 40)}"))


def _record(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
