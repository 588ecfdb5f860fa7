"""Who looks after a trial: drivers' heartbeats in the study's storage, and trials whose driver is gone.

Each driver writes one attribute of the study, its session, every few seconds. A trial names its driver. A RUNNING trial
whose driver has not been heard of for :data:`EXPIRED_S` (at once, where its process is gone from this very machine) is
an orphan: another driver takes it over and goes on from its checkpoint.

Two drivers may want the same orphan. A storage has no compare-and-set for attributes; so each writes its name, waits
longer than a write usually takes, and the one whose name is there then has it. Should both go on, the processes of the
trial settle it (:func:`tuning.trial.alone`), and the driver whose name is not there hears nothing of its own.
The clocks of the drivers' machines must agree within :data:`EXPIRED_S`, as they do with NTP.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from tuning.record import DRIVER
from tuning.search import SESSION, Session, read_sessions

BEAT_S = 10.0
EXPIRED_S = 60.0
SETTLE_S = 0.5


class Lease:
    """This driver's session with a study; a context manager.

    Args:
        study: Whose storage holds the sessions.
        slots: Trials side by side.
        beat_s: Seconds between two heartbeats.
        expired_s: Silence after which another driver counts as gone.
    """

    def __init__(
        self, study: optuna.Study, *, slots: int = 1, beat_s: float = BEAT_S, expired_s: float = EXPIRED_S
    ) -> None:
        self.study, self.slots, self.beat_s, self.expired_s = study, slots, beat_s, expired_s
        self.id = uuid.uuid4().hex[:12]
        self.started = time.time()
        self._settled = time.monotonic() + SETTLE_S
        self._leave = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self._write()
        self._settled = time.monotonic() + SETTLE_S
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        if self._thread is not None:
            self._thread.join(timeout=self.beat_s)
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
                "space": process_space(),
                "slots": self.slots,
                "started": self.started,
                "seen": time.time(),
                "ended": ended,
            },
        )

    def alive(self) -> set[str]:
        """Ids of all drivers that are alive, this one included."""
        return {self.id} | {s.id for s in read_sessions(self.study) if self._alive(s)}

    def first(self) -> bool:
        """Whether this driver is the one of those alive that has been there longest."""
        alive = self.alive()
        sessions = [s for s in read_sessions(self.study) if s.id in alive]
        return not sessions or min(sessions, key=lambda s: (s.started, s.id)).id == self.id

    def _alive(self, session: Session) -> bool:
        if session.ended or time.time() - session.seen > self.expired_s:
            return False
        if session.host != socket.gethostname() or session.space != process_space():
            return True  # the number of its process says nothing here
        if session.pid == os.getpid():
            return False  # a process has one driver at a time, and this one is another
        try:
            os.kill(session.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, ValueError):
            return True
        return True

    def orphans(self, study: optuna.Study) -> list[FrozenTrial]:
        """RUNNING trials that nobody looks after."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not running:
            return []
        alive = self.alive()
        return [t for t in running if t.user_attrs.get(DRIVER) not in alive and self._named(t)]

    def _named(self, trial: FrozenTrial) -> bool:
        """Whether a trial had the time to be named after its driver."""
        if trial.user_attrs.get(DRIVER) or trial.datetime_start is None:
            return True
        return time.time() - trial.datetime_start.timestamp() > self.expired_s or not self._others()

    def _others(self) -> bool:
        return len(self.alive()) > 1

    def name(self, study: optuna.Study, trial_id: int) -> None:
        """Write this driver's name on a trial that it has begun."""
        study._storage.set_trial_user_attr(trial_id, DRIVER, self.id)

    def one_by_one(self, work: Callable[[], None], done: Callable[[], bool]) -> None:
        """Have one driver do what must not be done twice at a time: the one that has been there longest.

        Args:
            work: Idempotent.
            done: Whether somebody has done it.
        """
        time.sleep(max(0.0, self._settled - time.monotonic()))  # until others' sessions can be seen, and this one
        while not done():
            if self.first():
                work()
                return
            time.sleep(0.5)

    def claim(self, study: optuna.Study, orphan: FrozenTrial) -> Trial | None:
        """Take an orphan over; ``None`` where another driver was given it, or it has ended."""
        try:
            study._storage.set_trial_user_attr(orphan._trial_id, DRIVER, self.id)
        except RuntimeError:  # it has ended
            return None
        if self._others():
            time.sleep(SETTLE_S + 0.1 * random.random())
        found = study._storage.get_trial(orphan._trial_id)
        mine = found.state == TrialState.RUNNING and found.user_attrs.get(DRIVER) == self.id
        return Trial(study, orphan._trial_id) if mine else None

    def holds(self, study: optuna.Study, trial: Trial) -> bool:
        """Whether a trial is still this driver's: not after a silence in which another one took it."""
        found = study._storage.get_trial(trial._trial_id)
        return found.state == TrialState.RUNNING and found.user_attrs.get(DRIVER) == self.id


def process_space() -> str:
    """In which space of process numbers this process is: containers of one host may share its name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:  # whatever a database's driver raises
        return
