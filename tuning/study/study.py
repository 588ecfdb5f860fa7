"""The Optuna study of a search, and the queue of its trials.

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
values, the others empty. To begin one, a driver owns its folder and moves it to RUNNING
(:mod:`tuning.study.lease`). So any number of drivers, killed at any moment, run exactly the planned trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from tuning.space.options import Objective
from tuning.space.space import SearchSpace
from tuning.study.record import FROM
from tuning.study.sampling import make_pruner, make_sampler
from tuning.study.store import check_internals, open_storage
from ugrl.errors import UgrlError
from ugrl.secrets import public_database as public

STUDY = "ugrl"
# Attributes of a study.
PLANNED, OBJECTIVES, WHERE = "planned", "objectives", "where"


def _nothing() -> None:
    return None


def study_name(storage: str, out: Path) -> str:
    """One name per file; where searches may share a database, the search's folder tells them apart."""
    return STUDY if storage == "journal" or storage.startswith("sqlite:") else f"{STUDY}:{out.name}"


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
        steps: Steps of a whole run.
        storage: Already open.
        planned: Whether to put the trials that the budget lacks into it at once; of drivers that may start together
            one does (:func:`tuning.study.lease.once`).

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
    check_internals(study)
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
