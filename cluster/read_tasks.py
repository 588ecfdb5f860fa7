"""Ray Data's reading tasks: they fetch the bytes of a rank's rows, in its order.

This module does not import torch. So a reading process starts in half a second and stays small; there may be one for
each CPU of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from ugrl.data.order import batch_rows
from ugrl.data.reader import ShardReader, wants_masks
from ugrl.data.shards import SCHEMA_VERSION, SCHEMAS, TEACHER_VERSION, Manifest, from_table, to_table
from ugrl.data.spec import LoaderSpec
from ugrl.errors import DataError, UgrlError
from ugrl.row import Row
from ugrl.storage import StorageError, place

# A process of Ray's pool keeps the readers of this many streams.
OPEN_STREAMS = 4
# Requests of a task at a time, where each row is a request over a network.
REQUESTS = 8

# The columns of a block besides those of the shards: the row's place, and the error that it met.
ERRORS: dict[str, Callable[[str], UgrlError]] = {
    "DataError": DataError,
    "StorageError": StorageError,
    "lasting": partial(StorageError, lasting=True),
}
PLACE = [
    pa.field("position", pa.int64()),
    pa.field("epoch", pa.int64()),
    pa.field("shard", pa.string()),
    pa.field("kind", pa.string()),
    pa.field("error", pa.string()),
]
# By whether rows have teacher masks.
VERSION = {False: SCHEMA_VERSION, True: TEACHER_VERSION}
CARRIED = {taught: pa.schema([*SCHEMAS[version], *PLACE]) for taught, version in VERSION.items()}


@dataclass(frozen=True, slots=True)
class Carried:
    """A row of a stream.

    Attributes:
        row: The row; empty where it could not be read.
        position: Its place in the stream, counted from 0.
        epoch: The epoch, which decides the crop together with the seed and the row's id.
        shard: The name of its shard, for messages.
        kind: The kind of the error, a key of :data:`ERRORS`; ``None`` without an error.
        error: The error's message.
    """

    row: Row
    position: int
    epoch: int
    shard: str
    kind: str | None = None
    error: str | None = None

    @property
    def bytes(self) -> int:
        """Size of the row's image and mask files."""
        return len(self.row.image) + len(self.row.mask or b"") + len(self.row.teacher or b"")


def fetch(
    batch: dict[str, Any], *, spec: LoaderSpec, manifest: Manifest, block_bytes: int, stream: str
) -> Iterator[pa.Table]:
    """Fetch the bytes of the rows at some positions of a rank's stream.

    An error travels in the place of its row. So it is raised at the row's step and not before.

    Args:
        batch: ``start`` and ``stop`` (1,): a span of the stream's rows, counted from its first.
        spec: Says which rows the stream has.
        manifest: The manifest of the shards.
        block_bytes: See :class:`cluster.blocks.BlockPlan`.
        stream: A name for the stream, unique in the cluster.

    Yields:
        Blocks of :data:`CARRIED`; usually one.
    """
    rows: list[Carried] = []
    size = 0
    reader = _opened.get(stream) or _open(stream, manifest, spec)
    for row in _read_ahead(range(int(batch["start"][0]), int(batch["stop"][0])), spec, reader):
        rows.append(row)
        size += row.bytes
        if row.error is not None:
            break
        if size >= block_bytes:
            yield pack(rows, teacher=spec.teacher)
            rows, size = [], 0
    if rows:
        yield pack(rows, teacher=spec.teacher)


def _read_ahead(positions: range, spec: LoaderSpec, reader: ShardReader) -> Iterator[Carried]:
    """The rows in order. Rows of a remote storage are requested several at a time."""
    read = partial(_read, spec=spec, reader=reader)
    if place(spec.shards).local is not None:
        yield from map(read, positions)
        return
    with ThreadPoolExecutor(REQUESTS, "ugrl-read") as pool:
        yield from pool.map(read, positions)


def _read(position: int, *, spec: LoaderSpec, reader: ShardReader) -> Carried:
    local = spec.local_batch
    step, slot = spec.start_step + position // local, position % local
    try:
        epoch, indices = batch_rows(
            step,
            seed=spec.seed,
            manifest=reader.manifest,
            split=spec.split,
            global_batch=spec.global_batch,
            rank=spec.rank,
            world=spec.world,
        )
        index = int(indices[slot])
        row = reader[index]
    except (DataError, StorageError) as error:
        kind = "lasting" if isinstance(error, StorageError) and error.lasting else None
        kind = kind or next(c.__name__ for c in type(error).__mro__ if c.__name__ in ERRORS)
        return Carried(Row("", b"", 0, 0, ()), position, 0, "", kind, str(error))
    row = row if wants_masks(step, spec.masks_every) else replace(row, mask=None)
    return Carried(row, position, epoch, reader.shard_of(index))


_opened: dict[str, ShardReader] = {}


def _open(stream: str, manifest: Manifest, spec: LoaderSpec) -> ShardReader:
    """Make a reader for a stream. A process keeps it, so that later tasks find the shards open."""
    while len(_opened) >= OPEN_STREAMS:
        del _opened[next(iter(_opened))]
    _opened[stream] = ShardReader(manifest, spec.split, spec.data, teacher=spec.teacher)
    return _opened[stream]


def pack(rows: list[Carried], *, teacher: bool = False) -> pa.Table:
    """Rows as a block of :data:`CARRIED`."""
    columns = list(to_table([r.row for r in rows], VERSION[teacher]).columns)
    columns += [pa.chunked_array([[getattr(r, f.name) for r in rows]], f.type) for f in PLACE]
    return pa.Table.from_arrays(columns, schema=CARRIED[teacher])


def unpack(table: pa.Table) -> list[Carried]:
    """The rows of a block, or of a part of it."""
    places = zip(*(table.column(f.name).to_pylist() for f in PLACE), strict=True)
    return [Carried(row, *place) for row, place in zip(from_table(table), places, strict=True)]


def start_reading_process() -> None:
    """Let Ray start the process for the first reading task on this node, before a batch is needed.

    Returns at once. It only saves time: Ray Data would start the process later.
    """
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    ray.remote(_import_data).options(num_cpus=0, max_retries=0, label_selector=here).remote()


def _import_data() -> None:
    import ray.data  # noqa: F401
