"""A node's copies of remote shards: each is fetched once, whatever number of processes reads it."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ugrl.data.shards import ShardInfo
from ugrl.errors import DataError
from ugrl.files import replacing
from ugrl.storage import Place, retry

_TRIES = 5
_LOG = logging.getLogger(__name__)


class ShardCache:
    """Keeps copies in a folder, the ones used last.

    A copy that is dropped while somebody reads it stays readable for them: its name goes, its data with its last
    reader.

    Args:
        folder: Folder of the copies, on a local disk.
        most_mb: How much may be kept, in 10⁶ bytes.
        patience_s: How long a remote storage that does not answer is asked again.
    """

    def __init__(self, folder: Path, most_mb: int, *, patience_s: float = 120.0) -> None:
        self.folder, self.most = folder, most_mb * 1_000_000
        self.patience_s = patience_s
        self._full = False

    def file(self, there: Place, info: ShardInfo) -> Path | None:
        """The copy of a shard, fetched if it is not there; ``None`` where it cannot be kept.

        Raises:
            DataError: The shard is not what the manifest says.
            StorageError: The storage does not answer.
        """
        if info.bytes > self.most or self._full:
            return None
        copy = self.folder / f"{info.sha256[:24]}.parquet"
        for _ in range(_TRIES):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._locked(copy):
                    if not (copy.is_file() and copy.stat().st_size == info.bytes):
                        self._make_room(info.bytes)
                        self._fetch(there, info, copy)
                    os.utime(copy)
                return copy
            except FileNotFoundError:  # another process has just needed the room
                continue
            except OSError as error:
                self._full = True
                _LOG.warning(
                    "%s: no copies of shards can be kept (%s); they are read from %s", self.folder, error, there.parent
                )
                return None
        return None

    def _fetch(self, there: Place, info: ShardInfo, copy: Path) -> None:
        data = retry(str(there), there.read, patience_s=self.patience_s, log=_LOG.warning)
        found = hashlib.sha256(data).hexdigest()
        if found != info.sha256:
            raise DataError(f"{there}: checksum {found[:12]}…; the manifest expects {info.sha256[:12]}…")
        with replacing(copy, durable=False) as draft:
            draft.write_bytes(data)

    def _make_room(self, need: int) -> None:
        kept = []
        for path in self.folder.glob("*.parquet"):
            with suppress(FileNotFoundError):  # another process makes room, too
                state = path.stat()
                kept.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + need <= self.most:
                return
            total -= size
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, copy: Path) -> Iterator[None]:
        with copy.with_suffix(".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
