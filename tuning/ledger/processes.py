"""Which of a driver's trials hold a process, and whether one more would find a place.

Ray Tune uses a process again for the next trial. While it waits for one, it holds its CPUs, which others may want.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from tuning.ledger.job import Job

# A trial that has not got its resources after so many seconds is put back into the queue.
PLACE_S = 30.0
# How often a driver with nothing to begin looks whether that has changed, and how long its processes wait for that.
IDLE_S, REST_S = 0.5, 5.0


class Room(Protocol):
    """What the cluster has free; see :class:`tuning.run.placement.Room`."""

    def trials(self) -> int:
        """Trials that what is free now would take."""


class Processes:
    """The processes of a driver.

    Args:
        jobs: The trials that the driver looks after, by their names in Tune; kept up to date by the ledger.

    Attributes:
        room: What the cluster has free; ``None`` where nobody asks.
    """

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.room: Room | None = None
        self._jobs = jobs
        self._count = 0
        self._idle_since = self._idle_until = 0.0

    def none_yet(self) -> None:
        """Ray Tune is started anew."""
        self._count = 0

    def placed(self, key: str) -> None:
        """A trial has got its resources."""
        if (job := self._jobs.get(key)) is not None:
            job.since, job.placed = time.time(), True
            self._count = max(self._count, self._working())

    def has_room(self) -> bool:
        """Whether one more trial finds a process that rests, or room on the cluster for a new one."""
        if self.room is None or len(self._jobs) < self._count:
            return True
        return bool(self.room.trials() > len(self._jobs) - self._working())

    def unplaced(self) -> list[str]:
        """Trials that have waited too long for a place; another driver may have one for them."""
        late = time.time() - PLACE_S
        return [] if self.room is None else [k for k, j in self._jobs.items() if not j.placed and j.since < late]

    def pausing(self) -> bool:
        """Whether it is too early to look again for a trial to begin."""
        return bool(self._jobs) and time.monotonic() < self._idle_until

    def idle(self) -> None:
        """There is no trial to begin now."""
        now = time.monotonic()
        self._idle_until = now + IDLE_S
        self._idle_since = self._idle_since or now

    def busy(self) -> None:
        """There is a trial to begin."""
        self._idle_since = 0.0

    def end_resting(self) -> bool:
        """Whether processes have had nothing to do for a while; whoever asks ends them."""
        working = self._working()
        rest = working < self._count and 0 < self._idle_since < time.monotonic() - REST_S
        if rest:
            self._count = working
        return rest

    def _working(self) -> int:
        return sum(job.placed for job in self._jobs.values())
