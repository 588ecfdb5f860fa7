"""How a stream of rows is cut into blocks for Ray's object store, and how much of the store it fills.

Ray Data's own limits know neither what a worker's neighbours take nor how large these blocks are.
"""

from __future__ import annotations

from dataclasses import dataclass

from ugrl.data.shards import Manifest

# A block costs Ray about 20 ms of CPU time, whatever it holds. So it holds a hundred rows or more.
BLOCK_BYTES, BLOCK_ROWS = 32_000_000, 4096
# The share of a node's object store that all streams on the node may fill together.
STORE_SHARE = 0.5
# Blocks in the store besides those of running tasks. Some wait for their turn. Two are no longer counted by Ray Data:
# the consumer unpacks one, and the next one is on its way.
WAITING, TAKEN = 2, 2


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """How a stream is cut into blocks.

    Attributes:
        block_bytes: A block ends with the row that reaches this size.
        rows: Rows of a block, by their mean size.
        tasks: Reading tasks at a time.
    """

    block_bytes: int
    rows: int
    tasks: int

    @property
    def limit(self) -> int:
        """Bytes that Ray Data may fill: for each task a block in writing and a finished one, and the waiting blocks."""
        return (2 * self.tasks + WAITING) * self.block_bytes

    def spans(self, total: int, first: int) -> list[tuple[int, int]]:
        """The positions of each task. Sizes double from ``first``, so that the first batch is there soon.

        >>> BlockPlan(1000, 8, 1).spans(20, 3)
        [(0, 3), (3, 9), (9, 17), (17, 20)]
        """
        out: list[tuple[int, int]] = []
        start, size = 0, min(first, self.rows)
        while start < total:
            out.append((start, min(start + size, total)))
            start, size = out[-1][1], min(2 * size, self.rows)
        return out


def plan_blocks(row_bytes: float, *, tasks: int, store_bytes: float) -> BlockPlan:
    """Blocks and tasks that keep a stream within its part of the object store.

    Args:
        row_bytes: Mean size of a row.
        tasks: The largest number of reading tasks at a time.
        store_bytes: The stream's part of the store.
    """
    row_bytes = max(1.0, row_bytes)
    tasks = max(1, min(tasks, int((store_bytes / row_bytes - WAITING - TAKEN) / 2)))
    block = max(row_bytes, min(BLOCK_BYTES, store_bytes / (2 * tasks + WAITING + TAKEN)))
    # Rows differ in size. At 0.8 of the rows that fill a block on average, few tasks need a second block.
    return BlockPlan(int(block), max(1, min(BLOCK_ROWS, int(0.8 * block / row_bytes))), tasks)


def stream_bytes(row_bytes: float, *, tasks: int, store_bytes: float) -> int:
    """Bytes of the object store that one worker's stream fills at most; arguments as for :func:`plan_blocks`.

    More than ``store_bytes`` only where a few rows alone are larger.
    """
    plan = plan_blocks(row_bytes, tasks=tasks, store_bytes=store_bytes)
    return plan.limit + TAKEN * plan.block_bytes


def mean_row_bytes(manifest: Manifest, split: str) -> float:
    """Mean size of a row of a split, as the shards hold it."""
    info = manifest.split(split)
    return sum(s.bytes for s in info.shards) / max(1, info.rows)


def store_part(streams: int) -> float:
    """A stream's part of the smallest object store in the cluster. That store may have to serve all streams."""
    import ray

    stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return STORE_SHARE * min((s for s in stores if s > 0), default=0.0) / max(1, streams)
