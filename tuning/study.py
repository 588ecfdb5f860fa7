"""The Optuna study of a search: its storage, its sampler, its pruner, and the queue of its trials.

The study in the storage is the one record of a search; a resumed search is built anew from it, and Ray Tune's own
snapshots are not read. States say what happened:

=========  =================================================================================
state      what happened
=========  =================================================================================
COMPLETE   reached the last step, with the mean of its seeds
PRUNED     stopped by the scheduler or a constraint, with the score of the step where it was stopped
FAIL       raised an error, scored NaN, or lost its process too often
RUNNING    the driver that owns its folder looks after it
WAITING    not begun, or put back by a driver that was asked to leave: goes on from its checkpoint
=========  =================================================================================

Every trial of the budget is in the storage from the beginning, WAITING: starting points and grid points with their
values, the others empty. To begin one, a driver owns its folder and moves it to RUNNING (:mod:`tuning.lease`). So any
number of drivers, killed at any moment, run exactly the planned trials.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from tuning.options import Objective
from tuning.record import DRIVER, FROM
from tuning.space import Axis, SearchSpace
from ugrl.errors import AwayError, ConfigError, UgrlError
from ugrl.foreign import read_bytes
from ugrl.secrets import HIDDEN
from ugrl.secrets import public_database as public
from ugrl.text import brief, line

STEP = "step"
STUDY = "ugrl"
FINALS = ":final"
JOURNAL = "study.journal"
BEGIN = b'{"op_code":'  # of every record
# Several processes may open a new database at once, and each makes its tables.
OPEN_TRIES = 20
# How long a file of SQLite may be locked by others, and a server may take to answer, in seconds.
LOCKED_S, CONNECT_S = 60, 10
# What databases say that are away for a while.
AWAY = ("locked", "refused", "timeout", "timed out", "starting up", "closed the connection", "shutting down")
# Attributes of a study.
PLANNED, OBJECTIVES, WHERE = "planned", "objectives", "where"


def _nothing() -> None:
    return None


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


class _Lines(JournalFileBackend):
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


def open_journal(path: Path) -> JournalStorage:
    """The storage in a journal's file, read to its end.

    A sound file is parsed once, by Optuna: what is spoiled in the middle stops it, and the end is looked at by itself,
    since Optuna leaves out a last line that is no record.

    Raises:
        ConfigError: A line that is no record, or says what cannot be; names it.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: no regular file; expected the journal of a study")
    backend = _Lines(str(path))
    try:
        storage = JournalStorage(backend)
    except Exception as error:  # whatever replaying a spoiled line leads to
        if mend_journal(path):
            return open_journal(path)
        raise ConfigError(spoiled(path, backend.line, line(error))) from None
    if not _ends_whole(path):
        mend_journal(path)  # the lines before it stay where they are: the storage goes on from there
    return storage


def _ends_whole(path: Path) -> bool:
    """Whether the last line of a journal is a record; only the file's end is read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = 1 << 12
        while True:
            start = max(0, size - length)
            file.seek(start)
            *lines, last = file.read(size - start).split(b"\n")
            if len(lines) > 1 or not start:
                return not last and (not lines or _record(lines[-1]))
            length *= 4


def spoiled(path: Path, number: int, why: str) -> str:
    """One line for a spoiled record."""
    return f"{path}: line {number}: no record of a study ({why}); restore the file from a copy, or begin a new search"


def mend_journal(path: Path) -> bool:
    """Take out what a machine that died, or a full disk, left half written.

    Optuna would read no further than such a line, and what others append after it would be lost. Half a line is no
    record: whoever wrote it was not told that it is safe. It is the last one, or the next record follows it on the same
    line.

    Returns:
        Whether anything was taken out.

    Raises:
        ConfigError: Another line is spoiled: without it, the numbers of what follows would mean something else.
    """
    if not path.exists() or _whole(read_bytes(path, "study's journal", error=ConfigError)):
        return False
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # nobody is writing now
    try:
        data = path.read_bytes()
        if torn := not _whole(data):
            *lines, last = data.split(b"\n")
            kept = [_mended(path, k, text) for k, text in enumerate(lines, 1)]
            kept += [last] if _record(last) else []
            temporary = path.with_name(path.name + ".mended")
            temporary.write_bytes(b"".join(text + b"\n" for text in kept))
            os.replace(temporary, path)
    finally:
        lock.release()
    return torn


def _whole(data: bytes) -> bool:
    *lines, last = data.split(b"\n")
    return not last and all(map(_record, lines))


def _mended(path: Path, number: int, text: bytes) -> bytes:
    """A line, or the record after half a one."""
    if _record(text):
        return text
    tail = text[text.rfind(BEGIN) :]
    if text.rfind(BEGIN) > 0 and text.startswith(BEGIN[:1]) and _record(tail):
        return tail
    raise ConfigError(spoiled(path, number, f"found {brief(text, 40)}"))


def _record(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def study_name(storage: str, out: Path) -> str:
    """One name per file; where searches may share a database, the search's folder tells them apart."""
    return STUDY if storage == "journal" or storage.startswith("sqlite:") else f"{STUDY}:{out.name}"


def distribution(axis: Axis) -> BaseDistribution:
    """An axis in Optuna's terms."""
    if axis.kind == "choice":
        return CategoricalDistribution(axis.options)
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step or None)


def suggest_point(trial: Trial, axes: Sequence[Axis]) -> dict[str, Any]:
    """The point of a trial: sampled, or what it has already; an axis that does not count is left out."""
    point: dict[str, Any] = {}
    for axis in axes:
        if not axis.active(point):
            continue
        if axis.kind == "choice":
            point[axis.path] = trial.suggest_categorical(axis.path, axis.options)
        elif axis.integer:
            point[axis.path] = trial.suggest_int(
                axis.path, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log
            )
        else:
            point[axis.path] = trial.suggest_float(axis.path, axis.low, axis.high, step=axis.step or None, log=axis.log)
    return point


def make_sampler(space: SearchSpace, number: int) -> BaseSampler:
    """The sampler of a trial.

    Args:
        space: The search.
        number: Of the trial: it moves the seed on, so that a resumed search goes on sampling instead of repeating its
            first points, and drivers side by side do not sample the same ones. What a sampler has learned is in the
            storage.
    """
    seed = (space.seed + 7919 * number) % 2**32
    # Points drawn before the model of good and bad ones starts: ten by default, too many for a small budget.
    startup = space.sampler.startup or min(10, max(3, space.trials // 4))
    name = space.sampler.name
    if name in ("random", "grid"):
        return RandomSampler(seed=seed)
    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=False)
    if name == "cmaes":
        return CmaEsSampler(seed=seed, n_startup_trials=startup)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(4, min(50, space.trials // 4)))
    conditional = any(a.when for a in space.search)
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=conditional)


def make_pruner(space: SearchSpace, steps: int) -> BasePruner:
    """The pruner: its knowledge is in the storage, so it survives its driver and is shared by several.

    Args:
        space: The search.
        steps: Of a whole run.
    """
    asked = space.scheduler
    factor = int(asked.reduction_factor)
    if asked.name == "asha":
        return SuccessiveHalvingPruner(min_resource=asked.grace_steps, reduction_factor=factor)
    if asked.name == "hyperband":
        return HyperbandPruner(min_resource=asked.grace_steps, max_resource=steps, reduction_factor=factor)
    if asked.name == "median":
        # "Below the median at a step": not before the grace period, nor with fewer than five trials to compare with.
        return MedianPruner(n_startup_trials=5, n_warmup_steps=asked.grace_steps - 1)
    return NopPruner()


def open_study(
    space: SearchSpace,
    out: Path,
    *,
    create: bool,
    objectives: Sequence[Objective],
    steps: int,
    storage: BaseStorage | None = None,
    planned: bool = True,
) -> optuna.Study:
    """Create the study of a search, or load an existing one.

    Args:
        space: The search.
        out: Its folder.
        create: Refuse a study that exists.
        objectives: What is optimised, by their real names.
        steps: Of a whole run.
        storage: Already open.
        planned: Whether to put the trials that the budget lacks into it at once; of drivers that may start together
            one does (:func:`tuning.lease.once`).

    Raises:
        UgrlError: The name is taken, or the study has other objectives.
    """
    storage = storage or open_storage(space.storage, out)
    name = study_name(space.storage, out)
    directions = [o.direction for o in objectives]
    if create or name not in optuna.get_all_study_names(storage):
        try:
            optuna.create_study(storage=storage, study_name=name, directions=directions)
        except optuna.exceptions.DuplicatedStudyError:  # the storage gives a name once
            if create:
                raise UgrlError(
                    f"storage {public(space.storage)!r} already holds a study named '{name}'; choose another --out or "
                    "--resume"
                ) from None
    study = optuna.load_study(storage=storage, study_name=name)
    names = [o.name for o in objectives]
    if OBJECTIVES not in study.user_attrs:
        study.set_user_attr(OBJECTIVES, names)
    elif (found := study.user_attrs.get(OBJECTIVES, names)) != names:
        raise UgrlError(f"study '{name}' optimises {', '.join(found)}, not {', '.join(names)}")
    if planned:
        plan(study, space)
    study.sampler = make_sampler(space, 0)
    study.pruner = make_pruner(space, steps)
    return study


def plan(
    study: optuna.Study,
    space: SearchSpace,
    warm: Sequence[tuple[str, Mapping[str, Any]]] = (),
    check: Callable[[], None] = _nothing,
) -> None:
    """Put the trials that the budget lacks into the study, waiting; calling it again adds nothing.

    Args:
        study: The study.
        space: The search.
        warm: (Where it is from, point) of points that come after the space's own.
        check: Called before each of them; raises where another driver plans by now.
    """
    trials = study.get_trials(deepcopy=False)
    given = [(f"first[{i}]", point) for i, point in enumerate(space.first)]
    given += [(text, point) for text, point in warm]
    if space.sampler.name == "grid":
        given = [(f"grid[{i}]", point) for i, point in enumerate(space.grid())]
    known = {t.user_attrs.get(FROM) for t in trials}
    count = len(trials)
    for origin, point in given:
        if count < space.trials and origin not in known:
            check()
            study.enqueue_trial(dict(point), user_attrs={FROM: origin})
            count += 1
    for _ in range(space.trials - count):
        check()
        study.enqueue_trial({})
    check()
    if study.user_attrs.get(PLANNED) != space.trials:
        study.set_user_attr(PLANNED, space.trials)


def is_spent(trial: FrozenTrial) -> bool:
    """Whether a trial has ended, well or badly."""
    return trial.state.is_finished()


def queue(study: optuna.Study, limit: int) -> list[FrozenTrial]:
    """The trials that wait, in their order, as far as the budget of ``limit`` trials that may have been begun has room.

    Whoever begins none but these keeps the budget, however many do so at once: all see the same ones.
    """
    trials = study.get_trials(deepcopy=False)
    waiting = [t for t in trials if t.state == TrialState.WAITING]
    return waiting[: max(0, limit - (len(trials) - len(waiting)))]


def put_back(study: optuna.Study, trial: Trial) -> None:
    """Let a trial wait again: whoever takes it goes on from its checkpoint, with the same parameters."""
    study._storage.set_trial_user_attr(trial._trial_id, DRIVER, "")
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def quiet_optuna() -> None:
    """Leave Optuna's warnings; drop its line for each trial."""
    import warnings

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # But for a journal whose lock is held: by a process that died, until it is taken from it.
    logging.getLogger(JournalFileSymlinkLock.__module__).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def trial_folder(out: Path, number: int) -> Path:
    """Where a trial's runs are written, one folder a seed."""
    return out / "trials" / f"{number:03d}"
