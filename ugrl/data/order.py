"""Who sees which row when: pure functions of (seed, epoch, step, rank), never of a loader.

A loader of any kind carries the bytes of the rows that :func:`batch_rows` names and augments each with
:func:`sample_rng`; so any number of threads, workers or ranks sees the same crops.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ugrl.data.shards import Manifest
from ugrl.errors import DataError
from ugrl.seeding import generator


def sample_rng(seed: int, epoch: int, id: str) -> np.random.Generator:
    """The random state of a sample, a function of its three arguments alone.

    >>> sample_rng(0, 1, "a").random() == sample_rng(0, 1, "a").random()
    True
    >>> sample_rng(0, 1, "a").random() == sample_rng(0, 2, "a").random()
    False
    """
    return generator(seed, "sample", epoch, id)


def epoch_order(seed: int, epoch: int, manifest: Manifest, split: str = "train") -> np.ndarray:
    """Row indices of a split, shuffled for an epoch.

    Returns:
        int64 (rows,), a permutation of positions in ``manifest.ids(split)``; read-only.
    """
    return _permutation(seed, epoch, split, manifest.rows(split))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, split: str, n: int) -> np.ndarray:
    order = generator(seed, "order", split, epoch).permutation(n)
    order.setflags(write=False)
    return order


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Full batches in n rows; the remainder of an epoch is dropped.

    Raises:
        DataError: The rows do not fill one batch.

    >>> steps_per_epoch(17, 8)
    2
    """
    if n < global_batch:
        raise DataError(f"{n} training rows do not fill one global batch of {global_batch}; expected at least as many")
    return n // global_batch


def batch_rows(
    step: int, *, seed: int, manifest: Manifest, split: str = "train", global_batch: int, rank: int = 0, world: int = 1
) -> tuple[int, np.ndarray]:
    """The rows that a rank sees at a step.

    Args:
        step: Counted from 0 over the whole run.
        seed: Seed of the run, from which the order is drawn.
        manifest: Manifest of the shards.
        split: Split that is trained on.
        global_batch: Rows of all ranks at a step.
        rank: Rank whose rows are wanted, from 0.
        world: Number of ranks.

    Returns:
        The epoch, and this rank's contiguous slice of the global batch: int64
        (global_batch / world,) positions in ``manifest.ids(split)``.

    Raises:
        DataError: The global batch does not divide by the ranks, or is larger than the split.
    """
    if global_batch % world:
        raise DataError(f"global batch {global_batch} does not divide by {world} ranks; expected a multiple")
    epoch, at = divmod(step, steps_per_epoch(manifest.rows(split), global_batch))
    local = global_batch // world
    start = at * global_batch + rank * local
    return epoch, epoch_order(seed, epoch, manifest, split)[start : start + local]
