"""The folder that ``ugrl export`` writes: its files are made elsewhere first, and nobody else's are touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ugrl import foreign
from ugrl.errors import ConfigError, DataError
from ugrl.files import write_whole
from ugrl.text import line

#: What an export says of itself; its key ``files`` has the digest of each file.
RECORD = "export.json"


def refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds anything but an export as it was written.

    Raises:
        ConfigError: Names the file that is another one.
    """
    if not out.is_dir():
        return
    own = _own(out)
    for path in sorted(out.iterdir()):
        if path.name == RECORD and own:
            continue
        if path.name not in own or path.is_symlink() or not path.is_file():
            why = "which ugrl export has not written"
        elif _digest(path) != own[path.name]:
            why = "which was changed after ugrl export wrote it"
        else:
            continue
        raise ConfigError(f"--out {line(out)}: holds {line(path.name, 60)}, {why}; choose another folder")


def _own(out: Path) -> dict[str, str]:
    """Digests of the files of an export that is there, by name."""
    file = out / RECORD
    if not file.is_file():
        return {}
    try:
        tree = foreign.as_dict(foreign.parse_json(file.read_bytes(), RECORD), RECORD)
        listed = foreign.as_dict(tree.get("files"), RECORD)
    except (DataError, OSError):
        return {}
    return {str(name): str(digest) for name, digest in listed.items() if Path(str(name)).name == name}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def draft(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that is filled by the body, and removed at its end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(made: Path, out: Path, facts: Mapping[str, Any]) -> dict[str, int]:
    """Move the files of a draft to their place, and write the record of them; those of an older export go.

    Returns:
        Bytes by file name.

    Raises:
        ConfigError: A file of somebody else came in between.
    """
    refuse_foreign(out)
    old = _own(out)
    sizes = {p.name: p.stat().st_size for p in sorted(made.iterdir())}
    digests = {name: _digest(made / name) for name in sizes}
    out.mkdir(exist_ok=True)
    for name in old.keys() - sizes.keys():
        (out / name).unlink(missing_ok=True)
    for name in sizes:
        os.replace(made / name, out / name)
    write_whole(out / RECORD, json.dumps({**facts, "files": digests}, indent=1) + "\n")
    return sizes
