"""Rows by index out of the shards. It needs no torch: reading processes of a cluster stay small."""

from __future__ import annotations

import bisect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ugrl.config import DataConfig
from ugrl.data.pages import LARGE, MappedShard, UnsupportedLayout
from ugrl.data.shard_cache import ShardCache
from ugrl.data.shards import SCHEMA, TEACHER, Manifest, check_row, from_table, open_shard, reading
from ugrl.errors import DataError
from ugrl.row import Row
from ugrl.storage import Place, StorageError, retry

# Shards that a thread keeps open: opening one costs a fifth of reading a row, but hundreds of shards times
# threads would exhaust handles.
OPEN_SHARDS = 4
DEFAULTS = DataConfig()
T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class ShardReader:
    """Random access to the rows of a split, from any number of threads.

    Args:
        shards: A prepared folder (a path, or a URI of a remote one), or its manifest.
        split: Name of the split to read.
        data: Of remote shards, where this node keeps copies and how long a storage that is away is asked again.
        teacher: Whether rows have their teacher masks, where the shards do; else they are not read.

    Raises:
        DataError: As :meth:`Manifest.load`, or no such split.
    """

    def __init__(
        self,
        shards: str | Path | Place | Manifest,
        split: str,
        data: DataConfig = DEFAULTS,
        *,
        teacher: bool = False,
    ) -> None:
        self.manifest = shards if isinstance(shards, Manifest) else Manifest.load(shards)
        self.split, self.teacher = split, teacher
        info = self.manifest.split(split)
        self._paths = self.manifest.paths(split)
        self._patience = data.storage_patience_s
        self._cache = None
        if data.cache_dir is not None and data.cache_disk_mb > 0 and isinstance(self.manifest.root, Place):
            self._cache = ShardCache(Path(data.cache_dir), data.cache_disk_mb, patience_s=self._patience)
        self._ends = list(accumulate(s.rows for s in info.shards))
        self._footers: dict[int, tuple[Any, list[int]]] = {}
        self._mapped: dict[int, MappedShard | None] = {}
        self._lock = threading.Lock()
        self._last = threading.local()

    def __len__(self) -> int:
        return self.manifest.rows(self.split)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids in row order."""
        return self.manifest.ids(self.split)

    @property
    def has_masks(self) -> bool:
        """Whether every row has a mask."""
        info = self.manifest.split(self.split)
        return info.with_masks == info.rows

    def __getitem__(self, index: int) -> Row:
        """The row at a position of :attr:`ids`; negative positions are refused."""
        n = len(self)
        if not 0 <= index < n:
            raise IndexError(f"row {index} of split '{self.split}' with {n} rows")
        shard = bisect.bisect_right(self._ends, index)
        local = index - (self._ends[shard - 1] if shard else 0)
        _, ends = self._footer(shard)
        group = bisect.bisect_right(ends, local)
        first = ends[group - 1] if group else 0
        mapped = self._mapped[shard] if shard in self._mapped else self._map(shard)
        row = None
        with reading(self._paths[shard], f"row {local} is unreadable"):
            if mapped is not None:
                with suppress(UnsupportedLayout):  # the library reads it, or words what is wrong with it
                    row = mapped.row(local, group, first)
            if row is None:
                row = from_table(self._group(shard, group).slice(local - first, 1))[0]
        return check_row(row, self.manifest.num_classes, str(self._paths[shard]))

    def rows(self, indices: Iterable[int]) -> list[Row]:
        """The rows at some positions, in their order."""
        return [self[int(i)] for i in indices]

    def shard_of(self, index: int) -> str:
        """The shard that a row lies in, for messages; reads nothing."""
        return str(self._paths[bisect.bisect_right(self._ends, index)])

    def _footer(self, shard: int) -> tuple[Any, list[int]]:
        """The shard's metadata, and the row index at which each of its row groups ends; read once."""
        with self._lock:
            if shard not in self._footers:
                meta = self._retried(shard, lambda: self._metadata(shard))
                ends = list(accumulate(meta.row_group(g).num_rows for g in range(meta.num_row_groups)))
                self._footers[shard] = meta, ends
            return self._footers[shard]

    def _map(self, shard: int) -> MappedShard | None:
        """The shard in memory, where it lies on a local disk for good."""
        path = self._paths[shard]
        with self._lock:
            if shard not in self._mapped:
                self._mapped[shard] = None
                if not isinstance(path, Place):
                    with (
                        open_shard(path, self._footers[shard][0]) as file,
                        suppress(Exception),  # the library reads row groups, or words what is wrong with them
                    ):
                        taught = self.teacher and TEACHER in file.schema_arrow.names
                        self._mapped[shard] = MappedShard(path, file, (*LARGE, TEACHER) if taught else LARGE)
            return self._mapped[shard]

    def _group(self, shard: int, group: int) -> pa.Table:
        # Each thread keeps its last row group: reading in order then reads every group once.
        if getattr(self._last, "key", None) != (shard, group):
            self._last.table = self._retried(shard, lambda: self._read(shard, group))
            self._last.key = (shard, group)
        return self._last.table

    def _metadata(self, shard: int) -> Any:
        with self._opened(shard, None) as file:
            return file.metadata

    def _read(self, shard: int, group: int) -> pa.Table:
        try:
            with reading(self._paths[shard], f"row group {group} is unreadable"):
                file = self._open(shard)
                columns = None if self.teacher or TEACHER not in file.schema_arrow.names else SCHEMA.names
                return file.read_row_group(group, columns=columns, use_threads=False)
        except (DataError, StorageError):
            self._last.files.pop(shard, None)  # a connection that broke is not used again
            raise

    def _retried(self, shard: int, action: Callable[[], T]) -> T:
        """Do something that may have to wait for a remote storage; a local disk is asked once."""
        if not isinstance(self._paths[shard], Place):
            return action()
        return retry(str(self._paths[shard]), action, patience_s=self._patience, log=_LOG.warning)

    def _opened(self, shard: int, footer: Any) -> pq.ParquetFile:
        """The shard, or this node's copy of it."""
        path, info = self._paths[shard], self.manifest.split(self.split).shards[shard]
        if self._cache is not None and isinstance(path, Place):
            copy = self._cache.file(path, info)
            if copy is not None:
                try:
                    return open_shard(copy, footer, rows=info.rows)
                except DataError:
                    if copy.exists():
                        raise
                    # Another process needed the room before it was opened here.
        return open_shard(path, footer, rows=info.rows)

    def _open(self, shard: int) -> pq.ParquetFile:
        if not hasattr(self._last, "files"):
            self._last.files = OrderedDict()
        files: OrderedDict[int, pq.ParquetFile] = self._last.files
        if shard not in files:
            files[shard] = self._opened(shard, self._footer(shard)[0])
        files.move_to_end(shard)
        while len(files) > OPEN_SHARDS:
            files.popitem(last=False)[1].close()
        return files[shard]


def wants_masks(step: int, every: int) -> bool:
    """Whether the batch of a step has masks, where they are wanted at every n-th step.

    >>> [wants_masks(step, 3) for step in range(6)]
    [False, False, True, False, False, True]
    """
    return every > 0 and (step + 1) % every == 0
