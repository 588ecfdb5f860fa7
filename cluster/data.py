"""A worker's batches through Ray Data: tasks carry compressed bytes, the consumer decodes them.

The loader decides nothing. Which row a step sees is :mod:`ugrl.data.order`'s word, and a crop is a
function of (seed, epoch, id); so these batches equal those of the local loader bit for bit, for any
number of workers and after any resume. One stream covers all steps that are left: no restart, and
no stall, between epochs.

Reading tasks ask for no logical CPU and are limited in number instead. Ray Data hands CPUs out by
whole numbers: one free CPU between two workers' streams is none for either, and both wait for ever.
That one CPU is free for them is checked before a run starts.

What Ray Data adds is that shards are read by tasks on any node with a free CPU. They read the
shards by path: the folder must be visible on every node. Only the bytes of JPEGs and PNGs go through
the object store; decoded crops would be many times larger.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.collate_fn import ArrowBatchCollateFn
from ray.exceptions import RayError

from ugrl.data.cache import PixelCache
from ugrl.data.make import BatchMaker, Loaded
from ugrl.data.order import batch_rows
from ugrl.data.reader import ShardReader, wants_masks
from ugrl.data.shards import from_table, to_table
from ugrl.errors import DataError, UgrlError
from ugrl.train.loop import LoaderSpec
from ugrl.types import Row

# Blocks of a few batches: the first is there soon, and a task has enough to do to pay for its start.
BLOCK_ROWS = (16, 256)
BLOCKS = 1000


def ray_loader(spec: LoaderSpec, *, tasks: int = 1) -> Iterator[Loaded]:
    """Batches of one rank for steps ``start_step … total_steps - 1``.

    To be called where Ray is connected, once in each training worker.

    Args:
        spec: What the trainer asks for.
        tasks: How many reading tasks this loader may run at a time.

    Yields:
        The batches (:class:`ugrl.data.make.Loaded`), in order of steps. Closing the generator stops the tasks.

    Raises:
        DataError: A broken shard or row.
    """
    local = spec.global_batch // spec.world
    total = (spec.total_steps - spec.start_step) * local
    if total <= 0:
        return
    _quiet()
    block = min(BLOCK_ROWS[1], max(BLOCK_ROWS[0], local, total // BLOCKS))
    spans = [{"start": a, "stop": min(a + block, total)} for a in range(0, total, block)]
    pool = ray.data.TaskPoolStrategy(size=max(1, tasks))
    stream = ray.data.from_items(spans, override_num_blocks=len(spans)).map_batches(
        partial(fetch, spec=spec), batch_size=None, batch_format="numpy", num_cpus=0, compute=pool
    )
    options = stream.context.execution_options
    options.preserve_order = True
    stream.context.enable_progress_bars = False
    # A validation longer than the timeout leaves the stream waiting for its consumer: no failure.
    stream.context.execution_no_progress_timeout_s = -1
    maker = BatchMaker(
        spec.augment,
        seed=spec.seed,
        on_device=spec.on_device,
        cache=PixelCache(spec.cache_mb) if spec.cache_mb > 0 else None,
        pin_memory=spec.pin_memory,
    )
    decode = Decode(maker, threads=spec.threads)
    batches = iter(
        stream.iterator().iter_torch_batches(
            batch_size=local, prefetch_batches=max(1, spec.prefetch), collate_fn=decode, device="cpu"
        )
    )
    try:
        for step in range(spec.start_step, spec.total_steps):
            found, batch = _next(batches)
            if found != step:
                raise DataError(f"{spec.shards}: Ray Data delivered step {found}; expected step {step}")
            yield batch
    finally:
        close = getattr(batches, "close", None)
        if close:
            close()
        decode.close()


def fetch(batch: dict[str, np.ndarray], spec: LoaderSpec) -> pa.Table:
    """Bytes of the rows at some positions of a rank's stream; runs in Ray Data's tasks.

    Args:
        batch: ``start`` and ``stop`` (1,): a span of the stream's rows, counted from its first.
        spec: Whose stream.

    Returns:
        n rows of the shards' schema with the columns ``step`` and ``epoch``.
    """
    reader = _reader(str(spec.shards), spec.split)
    local = spec.global_batch // spec.world
    rows: list[Row] = []
    steps: list[int] = []
    epochs: list[int] = []
    for position in range(int(batch["start"][0]), int(batch["stop"][0])):
        step, slot = spec.start_step + position // local, position % local
        epoch, indices = batch_rows(
            step,
            seed=spec.seed,
            manifest=reader.manifest,
            split=spec.split,
            global_batch=spec.global_batch,
            rank=spec.rank,
            world=spec.world,
        )
        row = reader[int(indices[slot])]
        rows.append(row if wants_masks(step, spec.masks_every) else replace(row, mask=None))
        steps.append(step)
        epochs.append(epoch)
    table = to_table(rows)
    return table.append_column("step", pa.array(steps, pa.int64())).append_column("epoch", pa.array(epochs, pa.int64()))


@lru_cache(maxsize=4)
def _reader(shards: str, split: str) -> ShardReader:
    """One reader per process of Ray's pool; tasks that follow find the manifest parsed."""
    return ShardReader(shards, split)


class Decode(ArrowBatchCollateFn):
    """Decode and augment a batch in the consumer.

    Args:
        maker: Makes batches.
        threads: Decoding threads; 0 works in Ray Data's prefetching thread.
    """

    def __init__(self, maker: BatchMaker, *, threads: int) -> None:
        self.maker = maker
        self.pool = ThreadPoolExecutor(threads, "ugrl-decode") if threads > 0 else None

    def __call__(self, batch: pa.Table) -> tuple[int, Loaded]:
        """The step, and its batch."""
        rows = from_table(batch)
        steps, epochs = batch.column("step").to_pylist(), batch.column("epoch").to_pylist()
        if len(set(steps)) != 1:
            raise DataError(f"Ray Data mixed the steps {steps[0]} and {steps[-1]} in one batch; expected one step")
        draft = self.maker.start(len(rows))

        def fill(k: int) -> None:
            self.maker.fill(draft, k, rows[k], epochs[k], self.maker.kept(rows[k].id))

        for _ in (self.pool.map if self.pool else map)(fill, range(len(rows))):
            pass  # raises what went wrong
        return steps[0], self.maker.finish(draft)

    def close(self) -> None:
        """Stop the threads."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _next(batches: Iterator[tuple[int, Loaded]]) -> tuple[int, Loaded]:
    """The next batch; an error that was ours inside a task is ours again."""
    try:
        return next(batches)
    except StopIteration:
        raise DataError("Ray Data ended before the run did") from None
    except (RayError, UgrlError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UgrlError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None or cause is error:
            raise
        raise type(cause)(str(cause)) from None


def _quiet() -> None:
    """Drop plans, bars and the line that says that there are no bars."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
