"""The storage of a study: a journal file or a database, and the only place that touches Optuna's internals.

Optuna's public interface cannot change the state of a given trial, or begin a trial that was seen in the storage: its
``ask`` takes whichever waits. A search with several drivers needs both, and a journal that never grows by half a record
(:class:`JournalFile`). What is used for that is private to Optuna. It was written for the version :data:`MADE_FOR`;
``tests/test_versions.py`` fails with another one, and :func:`check_internals` says what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from tuning.study.journal import ends_whole, mend_journal, spoiled
from tuning.study.record import DRIVER
from ugrl.command import complain
from ugrl.errors import AwayError, ConfigError, UgrlError
from ugrl.secrets import HIDDEN
from ugrl.secrets import public_database as public
from ugrl.storage import StorageError
from ugrl.text import line

T = TypeVar("T")
# The version of Optuna whose private attributes are used below.
MADE_FOR = "5.0"
JOURNAL = "study.journal"
# Several processes may open a new database at once, and each makes its tables.
OPEN_TRIES = 20
# How long a file of SQLite may be locked by others, and a server may take to answer, in seconds.
LOCKED_S, CONNECT_S = 60, 10
# How often a storage that is away is tried again, in seconds.
RETRY_S = 2.0
# What databases say that are away for a while.
AWAY = ("locked", "refused", "timeout", "timed out", "starting up", "closed the connection", "shutting down")


# -- opening -----------------------------------------------------------------------------------------


def open_storage(storage: str, out: Path) -> BaseStorage:
    """The storage of a search.

    Args:
        storage: ``journal`` for the file ``study.journal`` in ``out``, or a database URL. A relative
            SQLite path counts from ``out``.
        out: The search's folder.

    Raises:
        ConfigError: The database cannot be opened.
        AwayError: It is there, but does not answer.
    """
    if storage == "journal":
        return open_journal(out / JOURNAL)
    if HIDDEN in storage:
        raise ConfigError(f"storage '{storage}': its password is not written down; give it again with --storage")
    storage = _address(storage, out)
    waits = {"connect_args": _deadlines(make_url(storage).drivername)}
    tries = OPEN_TRIES
    while True:
        try:
            return RDBStorage(storage, engine_kwargs={"pool_pre_ping": True, **waits}, heartbeat_interval=None)
        except Exception as error:  # SQLAlchemy's errors, and a missing database driver
            tries -= 1
            if not tries or not _made_by_another(error):
                away = isinstance(error, DatabaseError) and any(w in str(error).lower() for w in AWAY)
                kind = AwayError if away else ConfigError
                raise kind(f"storage {public(storage)!r} cannot be opened: {_line(error)}") from None
            time.sleep(0.2)


def _deadlines(driver: str) -> dict[str, int]:
    """What a database's driver takes so that it does not wait without end, in its own words."""
    if driver.startswith("sqlite"):
        # Several drivers write to one file in turn; five seconds, its default, are too few under load.
        return {"timeout": LOCKED_S}
    if driver in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        # libpq's own wait for a server that vanished is the kernel's: two hours.
        quiet = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
        return {"connect_timeout": CONNECT_S, "tcp_user_timeout": 1000 * LOCKED_S, **quiet}
    return {}


def _address(storage: str, out: Path) -> str:
    """A database URL as Optuna takes it; a file of SQLite counts from ``out``, and may have any name."""
    try:
        url = make_url(storage)
    except SQLAlchemyError as error:
        raise ConfigError(f"storage {public(storage)!r}: no URL of a database ({_line(error)})") from None
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith((":", "file:")):
        return storage
    file = quote(str((out / url.database).absolute()))  # SQLite reads it as a URI: ?, # and % are escaped for it
    return URL.create("sqlite", database=f"file:{file}", query={**url.query, "uri": "true"}).render_as_string()


def _made_by_another(error: Exception) -> bool:
    """Whether another process makes the same tables at this moment: they will be there the next time."""
    words = f"{error} {error.__cause__}".lower()
    return isinstance(error, (DatabaseError, StorageInternalError)) and any(
        w in words for w in ("already exists", "unique", "duplicate")
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def open_journal(path: Path) -> JournalStorage:
    """The storage in a journal's file, read to its end.

    A sound file is parsed once, by Optuna: what is spoiled in the middle stops it, and the end is looked at by itself,
    since Optuna leaves out a last line that is no record.

    Raises:
        ConfigError: A line that is no record, or says what cannot be; names it.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: no regular file; expected the journal of a study")
    backend = JournalFile(str(path))
    try:
        storage = JournalStorage(backend)
    except Exception as error:  # whatever replaying a spoiled line leads to
        if mend_journal(path):
            return open_journal(path)
        raise ConfigError(spoiled(path, backend.line, line(error))) from None
    if not ends_whole(path):
        mend_journal(path)  # the lines before it stay where they are: the storage goes on from there
    return storage


def quiet_optuna() -> None:
    """Leave Optuna's warnings; drop its line for each trial."""
    import warnings

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # But for a journal whose lock is held: by a process that died, until it is taken from it.
    logging.getLogger(JournalFileSymlinkLock.__module__).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def retry_storage(work: Callable[[], T], patience_s: float) -> T:
    """Do something with the storage; a database that is away for a while is waited for.

    Raises:
        AwayError: It was away for too long.
    """
    until, told = time.monotonic() + patience_s, False
    while True:
        try:
            return work()
        except (OperationalError, StorageInternalError, StorageError, OSError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if time.monotonic() > until:
                raise AwayError(
                    f"the study's storage has been away for {patience_s:g} s (data.storage_patience_s; {why}); "
                    "continue with --resume once it answers"
                ) from None
            if not told:
                complain(f"the study's storage is away ({why}); trying again for up to {patience_s:g} s", word="")
                told = True
            time.sleep(RETRY_S)


# -- Optuna's internals ------------------------------------------------------------------------------


def check_internals(study: optuna.Study) -> None:
    """Refuse a version of Optuna whose internals are others.

    Raises:
        UgrlError: It names the version, and what is missing.
    """
    storage = getattr(study, "_storage", None)
    names = ("get_trial", "set_trial_user_attr", "set_trial_state_values")
    missing = [name for name in names if not hasattr(storage, name)] if storage is not None else ["study._storage"]
    if missing:
        raise UgrlError(
            f"optuna {optuna.__version__} has no {', '.join(missing)}; ugrl-tune was made for optuna {MADE_FOR}: "
            f"install optuna=={MADE_FOR}.*"
        )


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that holds a study: opening it once more would replay a journal, which takes seconds."""
    return study._storage


def id_of(trial: Trial | FrozenTrial) -> int:
    """What names a trial in its storage; its number counts within its study only."""
    return int(trial._trial_id)


def read_frozen(study: optuna.Study, trial: Trial | FrozenTrial) -> FrozenTrial:
    """A trial as the storage has it now."""
    return study._storage.get_trial(trial._trial_id)


def begin_trial(study: optuna.Study, seen: FrozenTrial, driver: str) -> Trial | None:
    """Have a trial RUNNING under a driver's name. The driver owns the trial's folder meanwhile.

    Args:
        study: The trial's.
        seen: The trial as it was found: WAITING, or RUNNING for a driver that is gone.
        driver: Its name.

    Returns:
        ``None`` where the trial has changed since it was looked at.
    """
    if read_frozen(study, seen).state != seen.state:
        return None
    try:
        study._storage.set_trial_user_attr(seen._trial_id, DRIVER, driver)
        if seen.state == TrialState.WAITING:
            study._storage.set_trial_state_values(seen._trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:  # its driver slept between its last look and its last word
        return None
    return Trial(study, seen._trial_id)


def put_back(study: optuna.Study, trial: Trial) -> None:
    """Let a trial wait again: whoever takes it goes on from its checkpoint, with the same parameters."""
    study._storage.set_trial_user_attr(trial._trial_id, DRIVER, "")
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def fixed_params(trial: FrozenTrial) -> dict[str, Any]:
    """The point that a trial was put into the queue with; empty where it is to be sampled."""
    return dict(trial.system_attrs.get("fixed_params", {}))


class JournalFile(JournalFileBackend):
    """The journal's file, and which of its lines is being read; it never grows by half a record."""

    line = 0

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """As its base class; a full disk, or a process that died in here, leaves no part of a record behind.

        Every driver that reads on would stumble over the record that is written after it on the same line.
        """
        text = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        self._lock.acquire()  # nobody else is writing now
        try:
            with open(self._file_path, "r+b", buffering=0) as file:
                end = _cut(file)
                try:
                    written = 0
                    while written < len(text):
                        written += file.write(text[written:])
                    os.fsync(file.fileno())
                except OSError as error:
                    file.truncate(end)
                    error.filename = error.filename or self._file_path
                    raise
        finally:
            self._lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """As its base class."""
        for self.line, log in enumerate(super().read_logs(log_number_from), log_number_from + 1):
            yield log


def _cut(file: FileIO) -> int:
    """Take off what follows a file's last newline; returns where it ends, and is ready to be written on."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            end = file.readall().rfind(b"\n") + 1
            file.truncate(end)
    return file.seek(end)
