"""A run with another number of workers: fewer when some cannot be started again, more when there is room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray

from cluster.capacity import EPS, Capacity, capacity, fits, sizes, worker_resources
from cluster.watchdog import beside
from ugrl.config import Config

# Pause between two looks for room, and how often in a row there must be room.
GROW_EVERY_S, GROW_LOOKS = 10.0, 3


def smaller(cfg: Config, workers: int, have: Capacity, *, groups: int = 1) -> int | None:
    """The largest allowed number of workers below ``workers`` that fits; ``None`` if there is none."""
    return next((n for n in sizes(cfg, workers)[1:] if fits(cfg, n, have, groups=groups)), None)


def can_grow(cfg: Config, workers: int, larger: Sequence[int], *, groups: int = 1) -> bool:
    """Whether one of the larger numbers of workers would fit now; the present workers keep what they hold."""
    have = capacity()
    free = ray.available_resources()
    each = worker_resources(cfg, have)
    return any(
        all((number - workers) * v <= free.get(k, 0.0) + EPS for k, v in each.items())
        for number in larger
        if fits(cfg, number, have, groups=groups)
    )


@contextmanager
def watch_for_room(
    cfg: Config, workers: int, most: int, *, groups: int = 1, found: Callable[[], None]
) -> Iterator[None]:
    """Look for room for more workers while the block runs, in a thread of its own.

    Args:
        cfg: The run's configuration.
        workers: Workers that it has.
        most: Workers that it may have at most.
        groups: Number of runs side by side.
        found: Called once, when there was room in :data:`GROW_LOOKS` looks in a row.
    """
    larger = [n for n in sizes(cfg, most) if n > workers]

    def look(ended: threading.Event) -> None:
        seen = 0
        while larger and not ended.wait(GROW_EVERY_S):
            seen = seen + 1 if can_grow(cfg, workers, larger, groups=groups) else 0
            if seen >= GROW_LOOKS:
                found()
                return

    with beside(look, "grow"):
        yield
