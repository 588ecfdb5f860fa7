"""Who looks after a search and its trials: one driver at a time, by the rule of :mod:`ugrl.ownership`.

A driver that begins a trial, or goes on with one that another driver left, owns the trial's folder first, and keeps it
until the trial has ended or waits again. What it then reads in the storage is true until it writes, since nobody else
changes the state of a trial whose folder is not theirs: so it moves the trial from WAITING to RUNNING, and no other
one does. The storage alone would not do. SQLite lets two processes read WAITING before either writes; in a journal, one
that had the trial before is told that it has it again. A RUNNING trial whose folder nobody owns is an orphan: its
driver has been silent for :data:`ugrl.ownership.STALE_S`, or is gone from this very machine.

The driver's name in the storage is for a driver that was cut off from the folder alone: who took the trial over wrote
its own there. A driver looks at both before each report and before it tells how a trial ended; the trial's processes
look at the folder before each write.

What must not be done twice, planning trials and final runs, is done by the one that owns the search's folder meanwhile.

Each driver also writes one attribute of the study, its session, every few seconds; the budget counts them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from tuning.study.record import DRIVER, SESSION
from tuning.study.store import begin_trial, id_of, read_frozen
from ugrl.errors import BusyError
from ugrl.ownership import LostError, Ownership, own
from ugrl.storage import place

BEAT_S = 10.0
# How long one driver waits for another one to plan, in seconds: ten thousand trials take minutes on a slow disk.
PLAN_S = 600.0


class Lease:
    """This driver's session with a study, and the trials that it owns; a context manager.

    Args:
        study: Whose storage holds the sessions.
        slots: Trials that the driver runs at a time.
        beat_s: Seconds between two heartbeats.
    """

    def __init__(self, study: optuna.Study, *, slots: int = 1, beat_s: float = BEAT_S) -> None:
        self.study, self.slots, self.beat_s = study, slots, beat_s
        self.id = uuid.uuid4().hex[:12]
        self.started = time.time()
        self._held: dict[int, tuple[ExitStack, Ownership]] = {}
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self._write()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        if self._thread is not None:
            self._thread.join(timeout=self.beat_s)
        for trial_id in list(self._held):
            self._release(trial_id)
        _quietly(lambda: self._write(ended=True))

    def _beat(self) -> None:
        while not self._leave.wait(self.beat_s):
            _quietly(self._write)  # a storage that is away for a moment is tried again at the next beat

    def _write(self, *, ended: bool = False) -> None:
        self.study.set_user_attr(
            SESSION + self.id,
            {
                "id": self.id,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "slots": self.slots,
                "started": self.started,
                "seen": time.time(),
                "ended": ended,
            },
        )

    def take(self, study: optuna.Study, seen: FrozenTrial, folder: Path) -> Trial | None:
        """Own a trial that waits, or an orphan, and have it RUNNING under this driver's name.

        Args:
            study: The study that the trial belongs to.
            seen: The trial as it was found.
            folder: Where the runs of the trial are written.

        Returns:
            ``None`` where another driver has it, or has had it since it was looked at.
        """
        with ExitStack() as stack:
            try:
                held = stack.enter_context(own(place(folder)))
            except BusyError:
                return None
            if (trial := begin_trial(study, seen, self.id)) is not None:
                self._held[id_of(seen)] = stack.pop_all(), held
            return trial

    def owner(self, trial: Trial) -> str:
        """Whom the processes of a trial write for (:func:`ugrl.ownership.fence`)."""
        return self._held[id_of(trial)][1].id

    def holds(self, study: optuna.Study, trial: Trial) -> bool:
        """Whether a trial is still this driver's: not after a silence in which another one took it."""
        if id_of(trial) not in self._held:
            return False
        try:
            self._held[id_of(trial)][1].check()
        except LostError:
            return False
        found = read_frozen(study, trial)
        return found.state == TrialState.RUNNING and found.user_attrs.get(DRIVER) == self.id

    def release(self, trial: Trial) -> None:
        """Own a trial no more: it has ended, waits again, or is another driver's."""
        self._release(id_of(trial))

    def _release(self, trial_id: int) -> None:
        if trial_id in self._held:
            self._held.pop(trial_id)[0].close()


def once(out: Path, work: Callable[[Callable[[], None]], None], done: Callable[[], bool]) -> None:
    """Have one driver do what must not be done twice.

    Args:
        out: The search's folder.
        work: Told what to call before each write; it raises where another driver has taken over.
        done: Whether somebody has done it.
    """
    if not done():
        with own(place(out), patience_s=PLAN_S) as held:
            if not done():
                work(held.check)


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:  # whatever a database's driver raises
        return
