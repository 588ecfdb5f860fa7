"""Rows by index out of the shards, and the loader of a single process."""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from ugrl.data.augment import Augment
from ugrl.data.order import batch_rows, sample_rng
from ugrl.data.shards import Manifest, from_table, open_shard
from ugrl.errors import DataError
from ugrl.types import Batch, Row, Sample, collate


class ShardReader:
    """Random access to the rows of a split, from any number of threads.

    Args:
        shards: A prepared folder, or its manifest.
        split: Name of the split.

    Raises:
        DataError: As :meth:`Manifest.load`, or no such split.
    """

    def __init__(self, shards: str | Path | Manifest, split: str) -> None:
        self.manifest = shards if isinstance(shards, Manifest) else Manifest.load(shards)
        self.split = split
        info = self.manifest.split(split)
        self._paths = self.manifest.paths(split)
        self._ends = list(accumulate(s.rows for s in info.shards))
        self._footers: dict[int, tuple[Any, list[int]]] = {}
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
        return self._group(shard, group)[local - (ends[group - 1] if group else 0)]

    def rows(self, indices: Iterable[int]) -> list[Row]:
        """The rows at some positions, in their order."""
        return [self[int(i)] for i in indices]

    def where(self, index: int) -> str:
        """Shard and id of a row, for messages."""
        return f"{self._paths[bisect.bisect_right(self._ends, index)]}, row {self.ids[index]}"

    def _footer(self, shard: int) -> tuple[Any, list[int]]:
        """The shard's metadata, and the row index at which each of its row groups ends; read once."""
        with self._lock:
            if shard not in self._footers:
                with open_shard(self._paths[shard]) as file:
                    meta = file.metadata
                ends = list(accumulate(meta.row_group(g).num_rows for g in range(meta.num_row_groups)))
                rows = ends[-1] if ends else 0
                expected = self._ends[shard] - (self._ends[shard - 1] if shard else 0)
                if rows != expected:
                    raise DataError(f"{self._paths[shard]}: {rows} rows; the manifest expects {expected}")
                self._footers[shard] = meta, ends
            return self._footers[shard]

    def _group(self, shard: int, group: int) -> list[Row]:
        # Each thread keeps its last row group: reading in order then reads every group once. Files are
        # opened anew (the footer is kept), as hundreds of shards times threads would exhaust handles.
        if getattr(self._last, "key", None) != (shard, group):
            path = self._paths[shard]
            try:
                with open_shard(path, self._footer(shard)[0]) as file:
                    rows = from_table(file.read_row_group(group, use_threads=False))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: row group {group} is unreadable ({str(error).splitlines()[0]})") from None
            self._last.rows, self._last.key = rows, (shard, group)
        found: list[Row] = self._last.rows
        return found


class LocalLoader:
    """Batches of this rank for steps ``start_step``, ``start_step + 1``, … without end.

    Which rows and crops a step has is decided by :mod:`ugrl.data.order` alone; threads only carry.

    Args:
        reader: Rows of the training split.
        augment: Makes samples.
        seed: Of the run.
        global_batch: Rows of all ranks at a step.
        rank: This rank.
        world: Number of ranks.
        threads: Worker threads (decoding and resampling release the interpreter lock); 0 works in the
            consumer.
        start_step: First step.
        prefetch: Batches prepared ahead.
        pin_memory: Whether images lie in page-locked memory, for copies that overlap with a GPU's work.

    Raises:
        DataError: The batch does not divide by the ranks or is larger than the split; while iterating,
            a broken row, named by shard and id.
    """

    def __init__(
        self,
        reader: ShardReader,
        augment: Augment,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 4,
        start_step: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.reader, self.augment, self.seed = reader, augment, seed
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.step = start_step
        self._ahead = start_step
        self._prefetch = max(1, prefetch)
        self._pin = pin_memory
        self._indices(start_step)  # refuse sizes that cannot work before any thread starts
        self._pool = ThreadPoolExecutor(threads, "ugrl-loader") if threads > 0 else None
        self._queue: deque[tuple[list[Future[Sample]], Future[Batch]]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            epoch, indices = self._indices(self.step)
            batch = self._finish([self._sample(epoch, i) for i in indices])
        else:
            while len(self._queue) < self._prefetch:
                self._submit(self._pool)
            batch = self._queue.popleft()[1].result()
            self._submit(self._pool)
        self.step += 1
        return batch

    def _indices(self, step: int) -> tuple[int, list[int]]:
        epoch, rows = batch_rows(
            step,
            seed=self.seed,
            manifest=self.reader.manifest,
            split=self.reader.split,
            global_batch=self.global_batch,
            rank=self.rank,
            world=self.world,
        )
        return epoch, [int(i) for i in rows]

    def _submit(self, pool: ThreadPoolExecutor) -> None:
        epoch, indices = self._indices(self._ahead)
        samples = [pool.submit(self._sample, epoch, i) for i in indices]
        # The pool starts tasks in order, so all samples have been started when this one is: it may wait.
        self._queue.append((samples, pool.submit(lambda: self._finish([s.result() for s in samples]))))
        self._ahead += 1

    def _sample(self, epoch: int, index: int) -> Sample:
        row = self.reader[index]
        try:
            return self.augment(row, sample_rng(self.seed, epoch, row.id))
        except DataError as error:
            raise DataError(f"{self.reader.where(index).rsplit(', row', 1)[0]}: {error}") from None

    def _finish(self, samples: list[Sample]) -> Batch:
        batch = collate(samples)
        if self._pin:
            batch = Batch(
                ids=batch.ids,
                images_B3HW=batch.images_B3HW.pin_memory(),
                tags_BF=batch.tags_BF.pin_memory(),
                boxes_B4=batch.boxes_B4,
                masks_BHW=None if batch.masks_BHW is None else batch.masks_BHW.pin_memory(),
                pairs_P2=batch.pairs_P2,
            )
        return batch

    def close(self) -> None:
        """Stop the threads; what was prepared ahead is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._queue.clear()

    def __enter__(self) -> LocalLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
