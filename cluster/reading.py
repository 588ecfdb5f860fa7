"""What runs in Ray Data's tasks: the bytes of a rank's rows, in its order.

Apart from the consumer, and without torch: such a process starts in half a second and stays small, and there may be
one for each CPU of a cluster.
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
from ugrl.data.shards import SCHEMA, Manifest, from_table, to_table
from ugrl.data.spec import LoaderSpec
from ugrl.errors import DataError, UgrlError
from ugrl.row import Row
from ugrl.storage import StorageError, place

# Streams whose readers a process of Ray's pool keeps.
OPEN_STREAMS = 4
# Rows that a task asks for at a time where each is a request over a network.
REQUESTS = 8

# What a carried row has besides the shards' columns: its place, and what is wrong with it.
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
CARRIED = pa.schema([*SCHEMA, *PLACE])


@dataclass(frozen=True, slots=True)
class Carried:
    """A row of a stream.

    Attributes:
        row: Without contents where something is wrong with it.
        position: In the stream, counted from 0.
        epoch: Decides the crop, with the seed and the row's id.
        shard: Where it lies, for messages.
        kind: Of what is wrong: a key of :data:`ERRORS`.
        error: What is wrong.
    """

    row: Row
    position: int
    epoch: int
    shard: str
    kind: str | None = None
    error: str | None = None

    @property
    def bytes(self) -> int:
        """Of the row's files."""
        return len(self.row.image) + len(self.row.mask or b"")


def fetch(
    batch: dict[str, Any], *, spec: LoaderSpec, manifest: Manifest, block_bytes: int, stream: str
) -> Iterator[pa.Table]:
    """Bytes of the rows at some positions of a rank's stream.

    What is wrong with a row travels in its place, so that it is heard of at its step and not before.

    Args:
        batch: ``start`` and ``stop`` (1,): a span of the stream's rows, counted from its first.
        spec: Whose rows.
        manifest: Of its shards.
        block_bytes: See :class:`Cut`.
        stream: Names the stream.

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
            yield pack(rows)
            rows, size = [], 0
    if rows:
        yield pack(rows)


def _read_ahead(positions: range, spec: LoaderSpec, reader: ShardReader) -> Iterator[Carried]:
    """Rows in order; those of a remote storage several at a time."""
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
    """One reader per process and stream: later tasks find shards open, and a new run looks anew."""
    while len(_opened) >= OPEN_STREAMS:
        del _opened[next(iter(_opened))]
    _opened[stream] = ShardReader(manifest, spec.split, spec.data)
    return _opened[stream]


def pack(rows: list[Carried]) -> pa.Table:
    """Rows as a block of :data:`CARRIED`."""
    columns = list(to_table([r.row for r in rows]).columns)
    columns += [pa.chunked_array([[getattr(r, f.name) for r in rows]], f.type) for f in PLACE]
    return pa.Table.from_arrays(columns, schema=CARRIED)


def unpack(table: pa.Table) -> list[Carried]:
    """The rows of a block, or of a part of it."""
    places = zip(*(table.column(f.name).to_pylist() for f in PLACE), strict=True)
    return [Carried(row, *place) for row, place in zip(from_table(table), places, strict=True)]


def begin_process() -> None:
    """Have Ray start a process for the first reading task on this node; it is there once batches are asked for.

    Returns at once. Nothing depends on it: without it Ray Data has the process started.
    """
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    ray.remote(_import_data).options(num_cpus=0, max_retries=0, label_selector=here).remote()


def _import_data() -> None:
    import ray.data  # noqa: F401
