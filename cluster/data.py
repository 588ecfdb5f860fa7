"""A worker's batches through Ray Data: tasks carry compressed bytes, the consumer decodes them.

The loader decides nothing. Which row a step sees is :mod:`ugrl.data.order`'s word, and a crop is a
function of (seed, epoch, id); so these batches equal those of the local loader bit for bit, for any
number of workers and after any resume. One stream covers all steps that are left: no restart, and
no stall, between epochs.

Reading tasks ask for no logical CPU and are limited in number instead. Ray Data hands CPUs out by
whole numbers: one free CPU between two workers' streams is none for either, and both wait for ever.
That CPUs are left free for them is checked before a run starts.

What Ray Data adds is that shards are read by tasks of their own, on the node that consumes them, which
are repeated where they die. A task reads the rows of one block of a stream, in the stream's order, so
that nothing is shuffled, split or copied afterwards. Only the bytes of JPEGs and PNGs go through the
object store; decoded crops would be many times larger. How much of the store a stream may fill is
decided here (:func:`cut`), since Ray Data's own limits know neither what a worker's neighbours take
nor how large a block of ours is.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources
from ray.exceptions import RayError

from cluster.pace import Pace
from cluster.reading import ERRORS, Carried, fetch, unpack
from ugrl.data.cache import PixelCache
from ugrl.data.make import BatchMaker, Draft, Loaded, awaited
from ugrl.data.reader import wants_masks
from ugrl.data.shards import Manifest
from ugrl.data.spec import LoaderSpec, silent
from ugrl.errors import DataError, UgrlError
from ugrl.storage import place, retry

# A block costs Ray about 20 ms of processor time, whatever is in it: worth it for a hundred rows and more.
BLOCK_BYTES, BLOCK_ROWS = 32_000_000, 4096
# Of a node's object store, what the streams that it may have to hold can fill together.
STORE_SHARE = 0.5
# Blocks that live besides those of running tasks: some that wait for their turn, and those that Ray Data no longer
# counts: one that is taken apart, and the next on its way.
WAITING, TAKEN = 2, 2
# Ray Data puts the description of every block into the store before it begins, 1 ms each; so it is given so many.
BLOCKS_AT_ONCE = 2000


@dataclass(frozen=True, slots=True)
class Cut:
    """How a stream is cut into blocks.

    Attributes:
        block_bytes: A block ends with the row that brings it here.
        rows: Of a block, by the mean size of a row.
        tasks: At a time.
    """

    block_bytes: int
    rows: int
    tasks: int

    @property
    def limit(self) -> int:
        """Bytes that Ray Data may fill: a block that is written and one that is done for each task, and some more."""
        return (2 * self.tasks + WAITING) * self.block_bytes

    def spans(self, total: int, first: int) -> list[tuple[int, int]]:
        """The positions of each task: from ``first`` doubling to full size, so that the first batch is there soon.

        >>> Cut(1000, 8, 1).spans(20, 3)
        [(0, 3), (3, 9), (9, 17), (17, 20)]
        """
        out: list[tuple[int, int]] = []
        start, size = 0, min(first, self.rows)
        while start < total:
            out.append((start, min(start + size, total)))
            start, size = out[-1][1], min(2 * size, self.rows)
        return out


def cut(row_bytes: float, *, tasks: int, store_bytes: float) -> Cut:
    """Blocks and tasks with which a stream stays within its part of the object store.

    Args:
        row_bytes: Mean size of a row.
        tasks: Most at a time.
        store_bytes: The stream's part.
    """
    row_bytes = max(1.0, row_bytes)
    tasks = max(1, min(tasks, int((store_bytes / row_bytes - WAITING - TAKEN) / 2)))
    block = max(row_bytes, min(BLOCK_BYTES, store_bytes / (2 * tasks + WAITING + TAKEN)))
    # Rows differ in size: with fewer than would fill it, few tasks need a second block for what is left over.
    return Cut(int(block), max(1, min(BLOCK_ROWS, int(0.8 * block / row_bytes))), tasks)


def stream_bytes(row_bytes: float, *, tasks: int, store_bytes: float) -> int:
    """Most bytes of the object store that one worker's stream fills; arguments as of :func:`cut`.

    Above ``store_bytes`` only where a few rows alone are larger.
    """
    made = cut(row_bytes, tasks=tasks, store_bytes=store_bytes)
    return made.limit + TAKEN * made.block_bytes


def mean_row_bytes(manifest: Manifest, split: str) -> float:
    """What a row of a split takes, as shards hold it."""
    info = manifest.split(split)
    return sum(s.bytes for s in info.shards) / max(1, info.rows)


def store_part(streams: int) -> float:
    """A stream's part of the smallest object store in the cluster, where that store may have to serve all of them."""
    stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return STORE_SHARE * min((s for s in stores if s > 0), default=0.0) / max(1, streams)


def ray_loader(spec: LoaderSpec, *, tasks: int = 1, store_bytes: float | None = None) -> Iterator[Loaded]:
    """Batches of one rank for steps ``start_step … total_steps - 1``.

    To be called where Ray is connected, once in each training worker.

    Args:
        spec: What the trainer asks for.
        tasks: How many reading tasks this loader may run at a time.
        store_bytes: Of the object store, what this stream may fill; by default its share among the ranks.

    Yields:
        The batches (:class:`ugrl.data.make.Loaded`), in order of steps. Closing the generator stops the tasks.

    Raises:
        DataError: A broken shard or row, when its step is reached.
    """
    local = spec.local_batch
    total = (spec.total_steps - spec.start_step) * local
    if total <= 0:
        return
    _quiet()
    spec = replace(spec, shards=place(spec.shards))  # which means the same in every process
    patience_s = spec.data.storage_patience_s
    manifest = retry(str(spec.shards), lambda: Manifest.load(spec.shards), patience_s=patience_s)
    room = store_part(spec.world) if store_bytes is None else store_bytes
    made = cut(mean_row_bytes(manifest, spec.split), tasks=tasks, store_bytes=room)
    sent = replace(spec, say=silent)  # the trainer stays here
    work = partial(fetch, spec=sent, manifest=manifest, block_bytes=made.block_bytes, stream=uuid.uuid4().hex)
    with Feeder(spec, _blocks(work, made, total, local)) as feeder:
        for _ in range(spec.start_step, spec.total_steps):
            yield feeder.next()


# --- what runs in the consumer --------------------------------------------------------------------------------------


def _blocks(work: Callable[..., Iterator[pa.Table]], made: Cut, total: int, local: int) -> Iterator[pa.Table]:
    """The stream's blocks, in order."""
    spans = made.spans(total, local)
    for first in range(0, len(spans), BLOCKS_AT_ONCE):
        yield from _execute(work, spans[first : first + BLOCKS_AT_ONCE], made)


def _execute(work: Callable[..., Iterator[pa.Table]], spans: list[tuple[int, int]], made: Cut) -> Iterator[pa.Table]:
    """Blocks of some spans, made by Ray Data."""
    # Where it is consumed: the bytes cross the network once, from the storage, and one process reads a worker's blocks
    # instead of one on each node. A node that goes takes the consumer along, so that nobody waits for it.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    items = [{"start": start, "stop": stop} for start, stop in spans]
    stream = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        work,
        batch_size=None,
        batch_format="numpy",
        num_cpus=0,
        label_selector=here,
        compute=ray.data.TaskPoolStrategy(size=made.tasks),
    )
    context, options = stream.context, stream.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=made.limit)
    context.enable_progress_bars = False
    # What a task is expected to put out before one has ended; blocks are cut here already.
    context.target_max_block_size = made.block_bytes
    # A validation longer than the timeout leaves the stream waiting for its consumer: no failure.
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pace]
    for bundle in stream.iter_internal_ref_bundles():
        for ref in bundle.block_refs:
            yield ray.get(ref)


class Feeder:
    """Takes blocks apart and decodes them ahead of the consumer, in threads of its own.

    Args:
        spec: Says how many threads decode (0: the one that feeds) and how many batches are made ahead.
        blocks: Of :func:`fetch`, in order.
    """

    def __init__(self, spec: LoaderSpec, blocks: Iterator[pa.Table]) -> None:
        self.spec, self.blocks = spec, blocks
        self.local = spec.local_batch
        data = spec.data
        self.maker = BatchMaker.of(spec, PixelCache(data.cache_mb) if data.cache_mb > 0 else None)
        self.pool = ThreadPoolExecutor(data.threads, "ugrl-decode") if data.threads > 0 else None
        self.made: queue.SimpleQueue[Future[Loaded]] = queue.SimpleQueue()
        self.coming: Future[Loaded] | None = None
        self.step = spec.start_step
        self.room = threading.Semaphore(data.prefetch)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._feed, name="ugrl-feed", daemon=True)

    def __enter__(self) -> Feeder:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.room.release()
        # A task may be waiting for storage that is away; then the thread ends when the task does.
        self.thread.join(timeout=5)
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        # Ray Data's executor refers to itself, and would keep its blocks in the store until a later collection.
        del self.blocks
        gc.collect()

    def next(self) -> Loaded:
        """The batch of the next step."""
        awaited(self._ready, self.step, stall_s=self.spec.stall_s, say=self.spec.say)
        assert self.coming is not None
        batch, self.coming = self.coming.result(), None
        self.step += 1
        self.room.release()
        return batch

    def _ready(self, seconds: float) -> bool:
        """Whether the next batch is there, or comes within some seconds."""
        until = time.monotonic() + seconds
        try:
            self.coming = self.coming or self.made.get(timeout=seconds)
        except queue.Empty:
            return False
        return bool(wait([self.coming], max(0.0, until - time.monotonic())).done)

    def _feed(self) -> None:
        failed: Future[Loaded] = Future()
        blocks = self.blocks
        try:
            for rows in steps(blocks, self.local):
                self.room.acquire()
                if self.closed.is_set():
                    return
                self.made.put(self._make(rows))
            raise DataError("Ray Data ended before the run did")
        except BaseException as error:  # whatever it is, the consumer hears of it
            failed.set_exception(_ours(error))
            self.made.put(failed)
        finally:
            with suppress(Exception):  # nobody is left to be told
                blocks.close()  # type: ignore[attr-defined]

    def _make(self, rows: list[Carried]) -> Future[Loaded]:
        """Start the batch of one step."""
        at = divmod(rows[0].position, self.local)[0] + self.spec.start_step
        draft = self.maker.start(len(rows), with_masks=wants_masks(at, self.spec.masks_every))
        if self.pool is None:
            done: Future[Loaded] = Future()
            for k, row in enumerate(rows):
                self._fill(draft, k, row)
            done.set_result(self.maker.finish(draft))
            return done
        filled = [self.pool.submit(self._fill, draft, k, row) for k, row in enumerate(rows)]

        def finish() -> Loaded:
            for sample in filled:
                sample.result()
            return self.maker.finish(draft)

        # The pool starts tasks in order, so all samples have been started when this one is: it may wait.
        return self.pool.submit(finish)

    def _fill(self, draft: Draft, k: int, carried: Carried) -> None:
        if carried.error is not None:
            raise ERRORS[carried.kind or ""](carried.error)
        row = carried.row
        try:
            self.maker.fill(draft, k, row, carried.epoch, self.maker.kept(row.id))
        except DataError as error:
            raise DataError(f"{carried.shard}: {error}") from None


def steps(blocks: Iterable[pa.Table], local: int) -> Iterator[list[Carried]]:
    """The rows of each step, out of blocks of any size.

    A block is held until its last row was taken; rows are copied out of it a step at a time.

    Raises:
        DataError: A row is missing, or in another's place.
    """
    rows: list[Carried] = []
    expected = 0
    for block in blocks:
        start = 0
        while start < block.num_rows:
            for carried in unpack(block.slice(start, local - len(rows))):
                if carried.position != expected:
                    raise DataError(f"Ray Data delivered row {carried.position} of a stream; expected row {expected}")
                rows.append(carried)
                start, expected = start + 1, expected + 1
            if len(rows) == local or rows[-1].error is not None:
                yield rows
                rows = []


def _ours(error: BaseException) -> BaseException:
    """An error that was ours inside a task is ours again."""
    if not isinstance(error, RayError | UgrlError):
        return error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UgrlError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    if cause is None or cause is error:
        return error
    made = type(cause)(str(cause))
    vars(made).update(vars(cause))  # such as whether waiting may help
    return made


def _quiet() -> None:
    """Drop plans, bars and the line that says that there are no bars."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
