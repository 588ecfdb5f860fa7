"""The Optuna study of a search: its storage, its sampler, its pruner, and the queue of its trials.

The study in the storage is the one record of a search; a resumed search is built anew from it, and Ray Tune's own
snapshots are not read. States say what happened:

=========  =================================================================================
state      what happened
=========  =================================================================================
COMPLETE   reached the last step, with the mean of its seeds
PRUNED     stopped by the scheduler or a constraint, with the score of the step where it was stopped
FAIL       raised an error, scored NaN, or lost its process too often
RUNNING    a driver that is alive looks after it
WAITING    not begun, or put back by a driver that was asked to leave: goes on from its checkpoint
=========  =================================================================================

Every trial of the budget is in the storage from the beginning, WAITING: starting points and grid points with their
values, the others empty. To begin one, a driver moves it to RUNNING, which the storage lets one driver do. So any
number of drivers, killed at any moment, run exactly the planned trials.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from tuning.options import Objective
from tuning.record import FROM
from tuning.search import SESSION
from tuning.space import Axis, SearchSpace
from ugrl.errors import ConfigError, UgrlError

STEP = "step"
STUDY = "ugrl"
FINALS = ":final"
JOURNAL = "study.journal"
# Attributes of a study.
PLANNED, OBJECTIVES, WHERE = "planned", "objectives", "where"
# How long a driver waits for another one that is planning the same study.
PLAN_PATIENCE_S = 30.0


def open_storage(storage: str, out: Path) -> BaseStorage:
    """The storage of a search.

    Args:
        storage: ``journal`` for the file ``study.journal`` in ``out``, or a database URL. A relative
            SQLite path counts from ``out``.
        out: The search's folder.

    Raises:
        ConfigError: The database cannot be opened.
    """
    if storage == "journal":
        mend_journal(out / JOURNAL)
        return JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    prefix = "sqlite:///"
    if storage.startswith(prefix) and not storage.startswith(prefix + "/"):
        storage = f"{prefix}{(out / storage.removeprefix(prefix)).absolute()}"
    try:
        # Several drivers write to one file of SQLite in turn; five seconds, its default, are too few under load.
        waits = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite:") else None
        return RDBStorage(storage, engine_kwargs=waits, heartbeat_interval=None)
    except Exception as error:  # SQLAlchemy's errors, and a missing database driver
        raise ConfigError(f"storage {public(storage)!r} cannot be opened: {_line(error)}") from None


def public(storage: str) -> str:
    """A database URL without its password.

    >>> public("postgresql+psycopg://ann:secret@db/ugrl")
    'postgresql+psycopg://ann:***@db/ugrl'
    """
    scheme, sep, rest = storage.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{sep}{user.split(':')[0]}:***@{host}" if at and ":" in user else storage


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def mend_journal(path: Path) -> None:
    """Cut off a last line that a machine that died, or a full disk, left half written.

    Optuna would read no further than such a line, and what others append after it would be lost. Half a line is no
    record: whoever wrote it was not told that it is safe.
    """
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 1_000_000)
            file.seek(start)
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                # A driver that is alive may be writing it right now: look again before cutting.
                time.sleep(0.2)
                if file.seek(0, os.SEEK_END) == size:
                    file.truncate(start + tail.rfind(b"\n") + 1)
    except FileNotFoundError:
        return


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


def make_sampler(space: SearchSpace, started: int) -> BaseSampler:
    """The sampler of a driver.

    Args:
        space: The search.
        started: Trials and drivers that were started before: the seed moves on with them, so that a resumed search
            goes on sampling instead of repeating its first points, and so does a driver beside others.
    """
    seed = (space.seed + 7919 * started) % 2**32
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
    warm: Sequence[tuple[str, Mapping[str, Any]]] = (),
    storage: BaseStorage | None = None,
) -> optuna.Study:
    """Create the study of a search with all its trials waiting, or load an existing one and add what its budget lacks.

    Args:
        space: The search.
        out: Its folder.
        create: Refuse a study that exists.
        objectives: What is optimised, by their real names.
        steps: Of a whole run.
        warm: Points of another study, with where they came from; tried after the starting points.
        storage: Already open.

    Raises:
        UgrlError: The name is taken, or the study has other objectives.
    """
    storage = storage or open_storage(space.storage, out)
    name = study_name(space.storage, out)
    exists = name in optuna.get_all_study_names(storage)
    if exists and create:
        raise UgrlError(
            f"storage {public(space.storage)!r} already holds a study named '{name}'; choose another --out or --resume"
        )
    directions = [o.direction for o in objectives]
    made = False
    if not exists:
        try:
            optuna.create_study(storage=storage, study_name=name, directions=directions)
            made = True
        except optuna.exceptions.DuplicatedStudyError:
            pass  # another driver was faster
    study = optuna.load_study(storage=storage, study_name=name)
    names = [o.name for o in objectives]
    if made:
        study.set_user_attr(OBJECTIVES, names)
    elif (found := study.user_attrs.get(OBJECTIVES, names)) != names:
        raise UgrlError(f"study '{name}' optimises {', '.join(found)}, not {', '.join(names)}")
    if not made:
        _await_plan(study)
    plan(study, space, warm)
    begun = sum(bool(t.params) for t in study.get_trials(deepcopy=False))
    study.sampler = make_sampler(space, begun + sum(key.startswith(SESSION) for key in study.user_attrs))
    study.pruner = make_pruner(space, steps)
    return study


def _await_plan(study: optuna.Study) -> None:
    """Wait while the driver that created the study is still filling its queue; one that died there is replaced."""
    until = time.monotonic() + PLAN_PATIENCE_S
    seen = -1
    while PLANNED not in study.user_attrs and time.monotonic() < until:
        count = len(study.get_trials(deepcopy=False))
        if count == seen:
            return  # nobody is filling it
        seen = count
        time.sleep(1.0)


def plan(study: optuna.Study, space: SearchSpace, warm: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
    """Put the trials that the budget lacks into the study, waiting; calling it again adds nothing."""
    trials = study.get_trials(deepcopy=False)
    given = [(f"first[{i}]", point) for i, point in enumerate(space.first)]
    given += [(text, point) for text, point in warm]
    if space.sampler.name == "grid":
        given = [(f"grid[{i}]", point) for i, point in enumerate(space.grid())]
    known = {t.user_attrs.get(FROM) for t in trials}
    count = len(trials)
    for origin, point in given:
        if count < space.trials and origin not in known:
            study.enqueue_trial(dict(point), user_attrs={FROM: origin})
            count += 1
    for _ in range(space.trials - count):
        study.enqueue_trial({})
    if study.user_attrs.get(PLANNED) != space.trials:
        study.set_user_attr(PLANNED, space.trials)


def is_spent(trial: FrozenTrial) -> bool:
    """Whether a trial has ended, well or badly."""
    return trial.state.is_finished()


def take_waiting(study: optuna.Study, limit: int) -> Trial | None:
    """Begin the first trial that waits, if the budget of ``limit`` trials has room.

    Returns:
        ``None`` where nothing waits.
    """
    trials = study.get_trials(deepcopy=False)
    begun = sum(t.state != TrialState.WAITING for t in trials)
    for trial in trials:
        if trial.state == TrialState.WAITING and begun < limit:
            try:
                mine = study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except RuntimeError:  # it has ended meanwhile, elsewhere
                continue
            if mine:
                return Trial(study, trial._trial_id)
    return None


def put_back(study: optuna.Study, trial: Trial) -> None:
    """Let a trial wait again: whoever takes it goes on from its checkpoint, with the same parameters."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def quiet_optuna() -> None:
    """Leave Optuna's warnings; drop its line for each trial."""
    import warnings

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def trial_folder(out: Path, number: int) -> Path:
    """Where a trial's runs are written, one folder a seed."""
    return out / "trials" / f"{number:03d}"
