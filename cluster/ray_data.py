"""A worker's batches through Ray Data: tasks read compressed bytes, the worker decodes them.

This loader decides neither the rows nor the crops. :mod:`ugrl.data.order` says which rows a step sees, and a crop is a
function of (seed, epoch, id). So the batches equal those of the local loader bit for bit, for any number of workers and
after any resume. One stream covers all remaining steps, so that no epoch begins with a wait.

Ray Data reads the shards in tasks of their own, on the node that consumes the rows, and repeats tasks that die. A task
reads the rows of one block, in the order of the stream; nothing is shuffled, split or copied afterwards. Only the bytes
of JPEGs and PNGs go through the object store, since decoded crops are many times larger. :mod:`cluster.blocks` says how
much of the store a stream may fill.

Reading tasks ask for no logical CPU; their number is limited instead. Ray Data hands out whole CPUs. With one free CPU
between the streams of two workers, neither would get it, and both would wait for ever. That enough CPUs are free for
the tasks is checked before a run starts (:mod:`cluster.capacity`).
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
from dataclasses import replace
from functools import partial

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources
from ray.exceptions import RayError

from cluster.blocks import BlockPlan, mean_row_bytes, plan_blocks, store_part
from cluster.ray_internals import block_refs, pause_scheduler
from cluster.read_tasks import ERRORS, Carried, fetch, unpack
from ugrl.data.cache import PixelCache
from ugrl.data.make import BatchMaker, Draft, Loaded, awaited
from ugrl.data.reader import wants_masks
from ugrl.data.shards import Manifest
from ugrl.data.spec import LoaderSpec, silent
from ugrl.errors import DataError, UgrlError
from ugrl.storage import place, retry

# Ray Data stores the description of every block before it begins, 1 ms each. So it gets this many at a time.
BLOCKS_AT_ONCE = 2000


def ray_loader(spec: LoaderSpec, *, tasks: int = 1, store_bytes: float | None = None) -> Iterator[Loaded]:
    """Batches of one rank for steps ``start_step … total_steps - 1``.

    Each training worker calls it once, connected to Ray.

    Args:
        spec: What the trainer asks for.
        tasks: Reading tasks that this loader may run at a time.
        store_bytes: Bytes of the object store that this stream may fill; by default its share among the ranks.

    Yields:
        The batches (:class:`ugrl.data.make.Loaded`), in order of steps. Closing the generator stops the tasks.

    Raises:
        DataError: A shard or row is broken; raised when its step is reached.
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
    plan = plan_blocks(mean_row_bytes(manifest, spec.split), tasks=tasks, store_bytes=room)
    sent = replace(spec, say=silent)  # the trainer stays here
    work = partial(fetch, spec=sent, manifest=manifest, block_bytes=plan.block_bytes, stream=uuid.uuid4().hex)
    with Feeder(spec, _blocks(work, plan, total, local)) as feeder:
        for _ in range(spec.start_step, spec.total_steps):
            yield feeder.next()


# --- what runs in the consumer --------------------------------------------------------------------------------------


def _blocks(work: Callable[..., Iterator[pa.Table]], plan: BlockPlan, total: int, local: int) -> Iterator[pa.Table]:
    """The stream's blocks, in order."""
    spans = plan.spans(total, local)
    for first in range(0, len(spans), BLOCKS_AT_ONCE):
        yield from _execute(work, spans[first : first + BLOCKS_AT_ONCE], plan)


def _execute(
    work: Callable[..., Iterator[pa.Table]], spans: list[tuple[int, int]], plan: BlockPlan
) -> Iterator[pa.Table]:
    """The blocks of some spans, read by Ray Data."""
    # Tasks run on the node of the consumer. The bytes cross the network once, from the storage, and one process reads a
    # worker's blocks instead of one on each node. If the node dies, its consumer dies as well and nobody waits.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    items = [{"start": start, "stop": stop} for start, stop in spans]
    stream = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        work,
        batch_size=None,
        batch_format="numpy",
        num_cpus=0,
        label_selector=here,
        compute=ray.data.TaskPoolStrategy(size=plan.tasks),
    )
    context, options = stream.context, stream.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=plan.limit)
    context.enable_progress_bars = False
    # Ray Data's estimate of a task's output, until the first task has ended. The blocks are cut already.
    context.target_max_block_size = plan.block_bytes
    # A stream may wait longer than the timeout for its consumer, during a validation. That is no failure.
    context.execution_no_progress_timeout_s = -1
    pause_scheduler(context)
    for ref in block_refs(stream):
        yield ray.get(ref)


class Feeder:
    """Unpacks blocks and decodes their rows ahead of the consumer, in threads of its own.

    Args:
        spec: Says how many threads decode (0: the feeding thread) and how many batches are made ahead.
        blocks: Blocks from :func:`fetch`, in order.
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
        # A task may wait for a storage that does not answer. Then this thread ends with the task.
        self.thread.join(timeout=5)
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        # Ray Data's executor refers to itself. Without a collection, it would keep its blocks in the store.
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
        """Whether the next batch is there within some seconds."""
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
        except BaseException as error:  # the consumer raises it
            failed.set_exception(_own_error(error))
            self.made.put(failed)
        finally:
            with suppress(Exception):  # nobody waits for these blocks
                blocks.close()  # type: ignore[attr-defined]

    def _make(self, rows: list[Carried]) -> Future[Loaded]:
        """Start to make the batch of one step."""
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

        # The pool starts its tasks in order. All samples have started before this one, so it may wait for them.
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
    """The rows of each step, from blocks of any size.

    Rows are copied one step at a time. A block is kept until its last row was copied.

    Raises:
        DataError: A row is missing or in a wrong place.
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


def _own_error(error: BaseException) -> BaseException:
    """The error of this project that Ray wrapped in a task, or else the error itself."""
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
    """Switch off Ray Data's messages and progress bars."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
