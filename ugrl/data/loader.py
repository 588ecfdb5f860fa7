"""The loader of a single process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ugrl.data.augment import Augment
from ugrl.data.cache import PixelCache
from ugrl.data.make import BatchMaker, Draft, Loaded, OnDevice, awaited, silent
from ugrl.data.order import batch_rows
from ugrl.data.reader import ShardReader, wants_masks
from ugrl.errors import DataError, HungError


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
        on_device: What is left to the device, see :mod:`ugrl.data.device`.
        cache_mb: Memory for decoded images, in 10⁶ bytes; 0 keeps none.
        masks_every: Steps n, 2n, … (counted from 1) have masks where the rows do; 0 leaves them out.
        cache: Decoded images of the same rows that were kept before; instead of a new one.
        stall_s: How long a batch is waited for, where there are threads.
        say: Told in one line what is waited for.

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
        on_device: OnDevice = "none",
        cache_mb: int = 0,
        masks_every: int = 1,
        cache: PixelCache | None = None,
        stall_s: float = 600.0,
        say: Callable[[str], None] = silent,
    ) -> None:
        self.reader, self.seed = reader, seed
        self.cache = cache  # which may be empty yet
        if cache is None and cache_mb > 0:
            self.cache = PixelCache(cache_mb)
        if self.cache is not None:
            self.cache.belong(reader.manifest.fingerprint(reader.split))
        self._maker = BatchMaker(augment, seed=seed, on_device=on_device, cache=self.cache, pin_memory=pin_memory)
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.step = start_step
        self._ahead = start_step
        self._prefetch = max(1, prefetch)
        self._masks_every = masks_every
        self._stall_s, self._say = stall_s, say
        self._indices(start_step)  # refuse sizes that cannot work before any thread starts
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
            while len(self._queue) < self._prefetch:
                self._submit(self._pool)
            try:
                made = self._queue.popleft()
                awaited(lambda s: bool(wait([made], s).done), self.step, stall_s=self._stall_s, say=self._say)
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
        return self._maker.start(count, with_masks=wants_masks(step, self._masks_every))

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
