"""The loader of a single process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ugrl.data.cache import PixelCache
from ugrl.data.make import BatchMaker, Draft, Loaded, awaited
from ugrl.data.order import batch_rows
from ugrl.data.reader import ShardReader, wants_masks
from ugrl.data.spec import LoaderSpec
from ugrl.errors import DataError, HungError


class LocalLoader:
    """Batches of one rank for steps ``start_step``, ``start_step + 1``, … without end.

    Which rows and crops a step has is decided by :mod:`ugrl.data.order` alone; threads only carry. Decoding and
    resampling release the interpreter lock.

    Args:
        spec: What is asked for.
        reader: Rows of its split; by default those of its shards.
        cache: Decoded images of the same rows that were kept before; instead of a new one.

    Raises:
        DataError: The batch does not divide by the ranks or is larger than the split; while iterating,
            a broken row, named by shard and id.
    """

    def __init__(self, spec: LoaderSpec, reader: ShardReader | None = None, *, cache: PixelCache | None = None) -> None:
        self.spec = spec
        self.reader = (
            ShardReader(spec.shards, spec.split, spec.data, teacher=spec.teacher) if reader is None else reader
        )
        self.cache = cache  # which may be empty yet
        if cache is None and spec.data.cache_mb > 0:
            self.cache = PixelCache(spec.data.cache_mb)
        if self.cache is not None:
            self.cache.belong(self.reader.manifest.fingerprint(self.reader.split) + "+teacher" * spec.teacher)
        self._maker = BatchMaker.of(spec, self.cache)
        self.step = spec.start_step
        self._ahead = spec.start_step
        self._indices(self.step)  # refuse sizes that cannot work before any thread starts
        threads = spec.data.threads
        self._pool = ThreadPoolExecutor(threads, "ugrl-loader") if threads > 0 else None
        self._queue: deque[Future[Loaded]] = deque()

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        if self._pool is None:
            epoch, indices = self._indices(self.step)
            draft = self._start(self.step, len(indices))
            for k, index in enumerate(indices):
                self._fill(draft, k, epoch, index)
            batch = self._maker.finish(draft)
        else:
            while len(self._queue) < self.spec.data.prefetch:
                self._submit(self._pool)
            try:
                made = self._queue.popleft()
                awaited(lambda s: bool(wait([made], s).done), self.step, stall_s=self.spec.stall_s, say=self.spec.say)
                batch = made.result()
            except HungError:  # its threads cannot be waited for
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool, self._queue = None, deque()
                raise
            self._submit(self._pool)
        self.step += 1
        return batch

    def _indices(self, step: int) -> tuple[int, list[int]]:
        epoch, rows = batch_rows(
            step,
            seed=self.spec.seed,
            manifest=self.reader.manifest,
            split=self.reader.split,
            global_batch=self.spec.global_batch,
            rank=self.spec.rank,
            world=self.spec.world,
        )
        return epoch, [int(i) for i in rows]

    def _submit(self, pool: ThreadPoolExecutor) -> None:
        epoch, indices = self._indices(self._ahead)
        draft = self._start(self._ahead, len(indices))
        filled = [pool.submit(self._fill, draft, k, epoch, index) for k, index in enumerate(indices)]

        def finish() -> Loaded:
            for sample in filled:
                sample.result()
            return self._maker.finish(draft)

        # The pool starts tasks in order, so all samples have been started when this one is: it may wait.
        self._queue.append(pool.submit(finish))
        self._ahead += 1

    def _start(self, step: int, count: int) -> Draft:
        return self._maker.start(count, with_masks=wants_masks(step, self.spec.masks_every))

    def _fill(self, draft: Draft, k: int, epoch: int, index: int) -> None:
        kept = self._maker.kept(self.reader.ids[index])
        row = self.reader[index] if kept is None else kept.row
        try:
            self._maker.fill(draft, k, row, epoch, kept)
        except DataError as error:
            raise DataError(f"{self.reader.shard_of(index)}: {error}") from None

    def close(self) -> None:
        """Stop the threads; what was prepared ahead is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._queue.clear()

    def __enter__(self) -> LocalLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
